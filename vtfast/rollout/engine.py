"""Batched sampling with the trainer's own weights: each prompt is prefilled once and its cache shared out to G rows.

Shapes: P prompts, R live rows (P x G at the start), L cache slots, D hidden size.

A row's tokens depend on (seed, prompt, sample number) and on nothing else: the sampler's randomness is a function of
(seed, row key, position), and a row key is made of the prompt's content and the sample number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache
from vtfast_kernels.linear_sample import linear_sample

from vtfast.errors import UserError
from vtfast.model import Policy
from vtfast.processor import Prompt


@dataclass(frozen=True)
class Sampling:
    """How to sample. The full softmax at `temperature`; nothing is read from the checkpoint's generation_config."""

    temperature: float = 1.0
    """Divides the logits; the loss must use the same one."""
    max_new_tokens: int = 64
    """Most tokens of a completion, the end-of-sequence token included."""
    greedy: bool = False
    """Take the most probable token instead of sampling."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise UserError(f"temperature {self.temperature}: must be above 0 (use greedy=True)")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens {self.max_new_tokens}: must be at least 1")


@dataclass(frozen=True)
class Completion:
    tokens: list[int]
    """Token ids; the end-of-sequence token belongs to the completion."""
    logprobs: list[float]
    """Log-probability of each token at the sampling temperature."""
    finish_reason: str
    """stop (an end-of-sequence token) or length."""


class RolloutEngine:
    """Generates from `policy.module` as it is at each call: edit a weight, and the next call sees it."""

    def __init__(self, policy: Policy) -> None:
        if set(policy.language_model.config.layer_types) != {"full_attention"}:
            raise UserError("the rollout does not support sliding-window attention")
        self.policy = policy

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        num_generations: int = 1,
        sampling: Sampling = Sampling(),
        seed: int = 0,
    ) -> list[list[Completion]]:
        """`num_generations` completions of each prompt: result[p][g]."""
        if not prompts:
            return []
        if num_generations < 1:
            raise UserError(f"num_generations {num_generations}: must be at least 1")
        rows = _Rows(self.policy, prompts, num_generations, sampling.max_new_tokens)
        eos = torch.tensor(self.policy.eos_ids, dtype=torch.int64, device=self.policy.device)
        for position in range(sampling.max_new_tokens):
            token_R, logp_R = linear_sample(
                rows.hidden,
                self.policy.head,
                temperature=sampling.temperature,
                seed=seed,
                row_key=rows.key,
                position=torch.full_like(rows.key, position),
                greedy=sampling.greedy,
            )
            rows.write(position, token_R, logp_R, finished=torch.isin(token_R, eos))
            if position + 1 == sampling.max_new_tokens or not rows.alive:
                break
            rows.advance(position)
        return rows.collect()


class _Rows:
    """The decode state of all rows that are still being written, and the output of all rows that ever were."""

    def __init__(self, policy: Policy, prompts: Sequence[Prompt], group: int, max_new: int) -> None:
        self.policy, self.group = policy, group
        device, count = policy.device, len(prompts) * group
        lengths = torch.tensor([len(prompt.ids) for prompt in prompts])
        self.prompt_slots = int(lengths.max())
        pad = self.prompt_slots - lengths

        # Prompts stand at the right end of the cache, so that all rows write their next token to the same slot.
        embeddings = policy.embed_prompts(prompts)
        batch = embeddings[0].new_zeros(len(prompts), self.prompt_slots, embeddings[0].shape[-1])
        position_ids = torch.zeros(3, len(prompts), self.prompt_slots, dtype=torch.int64)
        for i, prompt in enumerate(prompts):
            batch[i, pad[i] :] = embeddings[i]
            position_ids[:, i, pad[i] :] = prompt.positions
        slot = torch.arange(self.prompt_slots)
        visible = (slot >= pad[:, None])[:, None, None, :] & (slot <= slot[:, None])
        visible |= torch.eye(self.prompt_slots, dtype=torch.bool)  # a padded row must see something
        self.cache = DynamicCache(config=policy.language_model.config)
        hidden = self._forward(batch, position_ids.to(device), visible.to(device))

        self.cache.batch_repeat_interleave(group)
        self.hidden = hidden.repeat_interleave(group, dim=0)
        self.pad = pad.to(device).repeat_interleave(group)
        deltas = torch.tensor([int(prompt.rope_delta) for prompt in prompts])
        self.next_angle = (lengths + deltas).to(device).repeat_interleave(group)
        self.key = torch.tensor(
            [row_key(prompt.key, g) for prompt in prompts for g in range(group)], device=device
        )
        self.index = torch.arange(count, device=device)  # live row -> output row
        self.active = torch.ones(count, dtype=torch.bool, device=device)
        self.alive = True
        self.token = torch.zeros(count, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(count, max_new, dtype=torch.int64, device=device)
        self.logps = torch.zeros(count, max_new, device=device)
        self.lengths = torch.zeros(count, dtype=torch.int64, device=device)
        self.stopped = torch.zeros(count, dtype=torch.bool, device=device)

    def _forward(self, embeddings: Tensor, position_ids: Tensor, visible: Tensor) -> Tensor:
        """Appends to the cache and returns the hidden state of each row's last position [R, D]."""
        output = self.policy.language_model(
            inputs_embeds=embeddings,
            position_ids=position_ids,
            attention_mask={"full_attention": visible},
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.last_hidden_state[:, -1]

    def write(self, position: int, token: Tensor, logp: Tensor, finished: Tensor) -> None:
        self.token = token
        written = self.index[self.active]
        self.tokens[written, position] = token[self.active]
        self.logps[written, position] = logp[self.active]
        self.lengths[written] = position + 1
        self.stopped[self.index[self.active & finished]] = True
        self.active = self.active & ~finished
        live = int(self.active.sum())
        self.alive = live > 0
        if self.alive and live <= len(self.active) // 2:
            self._keep(self.active.nonzero().squeeze(1))

    def _keep(self, rows: Tensor) -> None:
        """Drops finished rows; worth a copy of the cache once half of them are."""
        self.cache.batch_select_indices(rows)
        for name in ("token", "index", "active", "key", "pad", "next_angle"):
            setattr(self, name, getattr(self, name)[rows])

    def advance(self, position: int) -> None:
        """One decode step: the tokens just written go in, the hidden states that predict the next come out."""
        slots = torch.arange(self.prompt_slots + position + 1, device=self.pad.device)
        self.hidden = self._forward(
            self.policy.embed(self.token)[:, None],
            (self.next_angle + position)[None, :, None].expand(3, -1, 1),
            (slots >= self.pad[:, None])[:, None, None, :],
        )

    def collect(self) -> list[list[Completion]]:
        lengths, stopped = self.lengths.tolist(), self.stopped.tolist()
        tokens, logps = self.tokens.tolist(), self.logps.tolist()
        rows = [
            Completion(tokens[r][:n], logps[r][:n], "stop" if stopped[r] else "length")
            for r, n in enumerate(lengths)
        ]
        return [rows[i : i + self.group] for i in range(0, len(rows), self.group)]


def row_key(prompt_key: int, sample: int) -> int:
    """Key of one row's randomness. Odd-constant mixing keeps neighbouring samples of a prompt unrelated."""
    mixed = (prompt_key + (sample + 1) * 0x9E3779B97F4A7C15) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    return (mixed ^ (mixed >> 31)) >> 1
