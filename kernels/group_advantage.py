"""Rewards -> group-normalised advantages.

    scale = "group"   (r - mean_G) / (std_G + eps)     unbiased std of the group; a group of one gives 0
    scale = "batch"   (r - mean_G) / (std_S + eps)     unbiased std of the whole batch
    scale = "none"     r - mean_G                      Dr. GRPO

Bytes: 8 a reward; a few thousand rewards, so launch bound.   Tolerance: fp32 within 1e-5 of float64.
Measured on a GPU: not yet.

Shapes: S sequences, G group size; a group is G neighbours.
"""

import torch

from .checks import REFERENCE_FLOATS, check_tensor, check_values, choose_impl, require

SCALES = ("group", "batch", "none")


def check_reward(reward: torch.Tensor, group_size: int, scale: str, eps: float) -> None:
    dtypes = (*REFERENCE_FLOATS, torch.int32, torch.int64)
    check_tensor("reward", reward, (None,), dtypes, reward)
    whole = isinstance(group_size, int) and not isinstance(group_size, bool) and group_size > 0
    require(whole, "group_size", f"a positive integer, got {group_size!r}")
    S = reward.shape[0]
    require(S % group_size == 0, "reward", f"{S} rewards are not whole groups of {group_size}")
    require(scale in SCALES, "scale", f"one of {', '.join(SCALES)}, got {scale!r}")
    require(isinstance(eps, (int, float)) and eps >= 0, "eps", f"not negative, got {eps!r}")
    if check_values(reward):
        require(bool(torch.isfinite(reward).all()), "reward", "holds a value that is not finite")


def group_advantage(
    reward: torch.Tensor,
    group_size: int,
    *,
    scale: str = "group",
    eps: float = 1e-4,
    impl: str = "auto",
) -> torch.Tensor:
    """Advantages [S] fp32 of rewards [S], normalised within groups of `group_size` neighbours.

    Args:
        reward: [S]; S a multiple of `group_size`.
        group_size: G, completions a prompt.
        scale: group | batch | none; what the centred reward is divided by.
        eps: added to the standard deviation, as in TRL.
        impl: auto | triton | torch | reference.
    """
    impl = choose_impl(impl, reward)
    check_reward(reward, group_size, scale, eps)
    from . import reference

    return reference.group_advantage(reward, group_size, scale=scale, eps=eps)
