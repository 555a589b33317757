"""Rewards -> group-normalised advantages.

    scale = "group"   (r - mean_G) / (std_G + eps)     unbiased std of the group; a group of one gives 0,
                                               so do equal rewards, even with eps = 0
    scale = "batch"   (r - mean_G) / (std_S + eps)     unbiased std of the whole batch
    scale = "none"     r - mean_G                      Dr. GRPO

Bytes: 8 per reward; a few thousand rewards, so launch bound.   Tolerance: fp32 within 1e-5 of float64.
Measured on a GPU: not yet.

Shapes: S sequences, G group size; a group is G neighbours.
"""

import torch
import triton
import triton.language as tl

from .checks import check_reward, choose_impl, op_scope


@triton.jit
def _std(ptr, n, BLOCK: tl.constexpr):
    """Return the unbiased standard deviation of n numbers, and mean minus first (exactly 0 if all are equal)."""
    lane = tl.arange(0, BLOCK)
    origin = tl.load(ptr)
    mean = 0.0
    for start in range(0, n, BLOCK):
        x = tl.load(ptr + start + lane, mask=start + lane < n, other=0.0).to(tl.float32)
        mean += tl.sum(tl.where(start + lane < n, x - origin, 0.0), 0)
    mean = mean / n
    square = 0.0
    for start in range(0, n, BLOCK):
        x = tl.load(ptr + start + lane, mask=start + lane < n, other=0.0).to(tl.float32)
        d = tl.where(start + lane < n, (x - origin) - mean, 0.0)
        square += tl.sum(d * d, 0)
    return tl.sqrt(square / tl.maximum(n - 1, 1)), mean


@triton.jit
def group_advantage_kernel(reward_ptr, advantage_ptr, S, G, eps, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    """One program per group."""
    first = tl.program_id(0) * G
    std, shift = _std(reward_ptr + first, G, BLOCK)
    divisor = 1.0
    if SCALE == "group":
        divisor = std + eps
    elif SCALE == "batch":  # a few thousand cached rewards: each program computes it, which is cheaper than a launch
        whole, _ = _std(reward_ptr, S, BLOCK)
        divisor = whole + eps
    if SCALE != "none":
        divisor = tl.where(divisor == 0.0, 1.0, divisor)  # eps 0 and no deviation: 0 / 1
    origin = tl.load(reward_ptr + first)
    for start in range(0, G, BLOCK):
        lane = start + tl.arange(0, BLOCK)
        reward = tl.load(reward_ptr + first + lane, mask=lane < G, other=0.0).to(tl.float32)
        tl.store(advantage_ptr + first + lane, ((reward - origin) - shift) / divisor, mask=lane < G)


@op_scope
def group_advantage(
    reward: torch.Tensor, group_size: int, *, scale: str = "group", eps: float = 1e-4, impl: str = "auto"
) -> torch.Tensor:
    """Return advantages [S] fp32 of rewards [S], normalised within groups of `group_size` neighbours.

    Args:
        reward: [S]; S a multiple of `group_size`.
        group_size: G, completions per prompt.
        scale: group | batch | none: the standard deviation to divide by.
        eps: added to the standard deviation, as in TRL.
        impl: auto | triton | torch | reference.
    """
    impl = choose_impl(impl, reward, "reward")
    check_reward(reward, group_size, scale, eps)
    if impl == "triton":
        reward, advantage = (reward.float().contiguous(), torch.empty_like(reward, dtype=torch.float32))
        S, groups = len(reward), len(reward) // group_size
        # one reward has no deviation: leave it undivided, as the reference does
        scale = "none" if (scale == "group" and group_size == 1) or S == 1 else scale
        if S > 0:
            group_advantage_kernel[(groups,)](reward, advantage, S, group_size, eps, SCALE=scale, BLOCK=1024)
        return advantage
    from . import reference  # a few thousand numbers: the plain formula is fast enough on the CPU

    return reference.group_advantage(reward, group_size, scale=scale, eps=eps)
