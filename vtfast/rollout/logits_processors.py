"""Sampling with logits processors (top-k, top-p, penalties ...): the slow path, which holds the logits [R, V].

The order and the meaning of the settings are transformers': penalty, minimum length, temperature, top-k, top-p, min-p.
The randomness is `linear_sample`'s, so a processor that changes nothing samples the same tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vtfast_kernels.sampling_noise import exponential_noise

from vtfast.rollout.sampling_params import Sampling

UNIT = 1 << 52
"""Probability 1 as an integer."""


def sample_with_processors(
    hidden: Tensor,
    head: Tensor,
    sampling: Sampling,
    *,
    seed: Tensor,
    row_key: Tensor,
    position: Tensor,
    eos_ids: Tensor,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return tokens [R] int64, and their log-probs [R] fp32 under the warped distribution.

    `seen`: [R, V] bool, tokens of the row's prompt and completion; needed for the repetition penalty.
    """
    logits = hidden.float() @ head.float().t()
    if sampling.repetition_penalty != 1:
        assert seen is not None
        penalty = sampling.repetition_penalty
        penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
        logits = torch.where(seen, penalised, logits)
    if sampling.min_new_tokens and len(eos_ids):
        early = position < sampling.min_new_tokens
        logits[:, eos_ids] = logits[:, eos_ids].masked_fill(early[:, None], -torch.inf)
    log_p = (logits / sampling.temperature).log_softmax(-1)
    if 0 < sampling.top_k < log_p.shape[1]:
        least = log_p.topk(sampling.top_k).values[:, -1:]
        log_p = log_p.masked_fill(log_p < least, -torch.inf).log_softmax(-1)
    if sampling.top_p < 1:
        ordered, ids = log_p.sort(descending=True, stable=True)
        # Integers, since CUDA sums floats in no fixed order and refuses to under `--deterministic`.
        share = (ordered.double().exp() * UNIT).long()
        drop = share.cumsum(-1) - share >= int(sampling.top_p * UNIT)
        drop = torch.zeros_like(drop).scatter(1, ids, drop)
        log_p = log_p.masked_fill(drop, -torch.inf).log_softmax(-1)
    if sampling.min_p > 0:
        least = log_p.amax(-1, keepdim=True) + torch.tensor(sampling.min_p).log()
        log_p = log_p.masked_fill(log_p < least, -torch.inf).log_softmax(-1)
    score = log_p
    if not sampling.greedy:
        score = log_p - exponential_noise(seed, row_key, position, 0, log_p.shape[1]).log()
    token = score.argmax(-1)
    return token, log_p.gather(1, token[:, None])[:, 0]
