"""The GRPO loss of a micro-batch, as the module that DeepSpeed trains."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vtfast_kernels.checks import IGNORE_INDEX
from vtfast_kernels.grpo_loss import GRPOLoss
from vtfast_kernels.linear_grpo_loss import linear_grpo_loss

from vtfast.config import Config
from vtfast.data.prompt import Prompt
from vtfast.model.packing import Pack
from vtfast.model.policy import Policy
from vtfast.training.groups import MicroBatch

SUMS = ("entropy", "kl", "clip_ratio/low", "clip_ratio/high", "sampler_drift")
"""Metrics of a micro-batch, summed over its scored tokens."""
SPARSE_SUMS = ("dropped", "dense_rows", "kept")
"""With `sparse_tau`, also these."""


class GRPOObjective(nn.Module):
    """The trunk over a packed micro-batch, then head and loss in one op that never holds the logits."""

    def __init__(
        self, policy: Policy, spec: GRPOLoss, use_sampler_logprobs: bool = False, sparse_tau: float = 0.0
    ) -> None:
        super().__init__()
        self.module = policy.module
        self.policy, self.spec, self.use_sampler_logprobs = policy, spec, use_sampler_logprobs
        self.sparse_tau = sparse_tau
        self.sums = SUMS + SPARSE_SUMS if sparse_tau else SUMS
        """Names of the sums that `forward` returns."""

    def forward(self, micro_batch: MicroBatch, num_sequences: int, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, `sums` [5 or 8] fp32, and the largest |log-prob - sampler's log-prob| of a token.

        The denominators `num_sequences` and `num_tokens` count all micro-batches and ranks of the step."""
        if not micro_batch.parts:
            return self._empty()
        pack, device = micro_batch.pack, self.policy.device
        old = micro_batch.logprobs("old")
        sampled = micro_batch.sampler_logprobs().to(device)
        out = linear_grpo_loss(
            pack.gather_predictors(self.policy.hidden_states(pack)),
            self.policy.head,
            pack.target,
            pack.sequence_id,
            micro_batch.advantage().to(device),
            spec=self.spec,
            old_logp=old,
            ref_logp=micro_batch.logprobs("reference") if self.spec.beta > 0 else None,
            sampler_logp=sampled if self.use_sampler_logprobs else None,
            near_logp=sampled,
            num_sequences=num_sequences,
            num_tokens=num_tokens,
            sparse_tau=self.sparse_tau,
        )
        assert out.entropy is not None, "the fused loss sees the logits"
        tokens = len(pack.target)
        trainer = out.logp.detach() if old is None else old  # by the weights that sampled
        mismatch = (trainer - sampled).abs()
        sums = [
            out.entropy.sum(),
            out.kl.sum() if out.kl is not None else torch.zeros_like(out.loss),
            out.clip_low * tokens,
            out.clip_high * tokens,
            mismatch.sum(),
        ]
        if out.dropped is not None and out.dense_rows is not None and out.kept is not None:
            sums += [out.dropped.sum(), out.dense_rows * tokens, out.kept * tokens]
        return out.loss, torch.stack(sums).detach(), mismatch.max()

    def _empty(self) -> tuple[Tensor, Tensor, Tensor]:
        """A rank without sequences in this micro-batch: zero gradients, and the same collectives as the others."""
        device, pack = self.policy.device, shortest_pack(self.policy)
        out = linear_grpo_loss(
            pack.gather_predictors(self.policy.hidden_states(pack)),
            self.policy.head,
            torch.full_like(pack.target, IGNORE_INDEX),
            pack.sequence_id,
            torch.zeros(1, device=device),
            spec=self.spec,
            ref_logp=torch.zeros(1, device=device) if self.spec.beta > 0 else None,
            num_sequences=1,
            num_tokens=1,
        )
        return out.loss, torch.zeros(len(self.sums), device=device), torch.zeros((), device=device)


def shortest_pack(policy: Policy) -> Pack:
    """A prompt of one token and a completion of one token."""
    prompt = Prompt(torch.zeros(1, dtype=torch.int64), torch.zeros(3, 1, dtype=torch.int64))
    return policy.pack([prompt], [[[0]]])


def loss_spec(config: Config) -> GRPOLoss:
    return GRPOLoss(
        loss_type=config.loss_type,
        beta=config.beta,
        epsilon_low=config.epsilon,
        epsilon_high=config.epsilon if config.epsilon_high is None else config.epsilon_high,
        delta=config.delta,
        importance_level=config.importance_sampling_level,
        temperature=config.temperature,
        max_completion_length=config.max_completion_length,
        vllm_importance_sampling_mode=config.vllm_importance_sampling_mode,
        vllm_importance_sampling_clip_max=config.vllm_importance_sampling_clip_max,
        vllm_importance_sampling_clip_min=config.vllm_importance_sampling_clip_min,
    )
