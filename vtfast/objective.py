"""The GRPO loss of one micro-batch, as the module that DeepSpeed trains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from vtfast_kernels.grpo_loss import GRPOLoss
from vtfast_kernels.linear_grpo_loss import linear_grpo_loss

from vtfast.config import Config
from vtfast.groups import Group
from vtfast.model import Policy
from vtfast.scoring import completion_hidden


class Objective(nn.Module):
    """The loss of one micro-batch of groups, as the module that DeepSpeed trains."""

    def __init__(self, policy: Policy, spec: GRPOLoss) -> None:
        super().__init__()
        self.module = policy.module
        self.policy, self.spec = policy, spec

    def forward(
        self, groups: Sequence[Group], num_sequences: int, num_tokens: int
    ) -> tuple[Tensor, dict[str, float]]:
        """-> (loss, sums over this micro-batch's tokens). Denominators are those of the whole step, all ranks."""
        hidden, target, sequence_id = completion_hidden(
            self.policy,
            [group.question.prompt for group in groups],
            [group.tokens for group in groups],
        )
        sampled = [logp for group in groups for c in group.completions for logp in c.logprobs]
        reference = None
        if self.spec.beta > 0:
            reference = torch.cat([logp for group in groups for logp in group.reference])
        out = linear_grpo_loss(
            hidden,
            self.policy.head,
            target,
            sequence_id,
            torch.cat([group.advantage for group in groups]).to(hidden.device),
            spec=self.spec,
            ref_logp=reference,
            num_sequences=num_sequences,
            num_tokens=num_tokens,
        )
        drift = (out.logp.detach() - torch.tensor(sampled, device=hidden.device)).abs()
        sums = {
            "entropy": float(out.entropy.sum()),
            "kl": float(out.kl.sum()) if out.kl is not None else 0.0,
            "clip_ratio/low": float(out.clip_low) * len(drift),
            "clip_ratio/high": float(out.clip_high) * len(drift),
            "sampler_drift": float(drift.sum()),
        }
        return out.loss, sums


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
    )
