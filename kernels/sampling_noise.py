"""Exponential noise from a hash, in Triton and in PyTorch: a function of (seed, row key, position, id) only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checks import check_tensor, require

GOLDEN: tl.constexpr = tl.constexpr(0x9E3779B97F4A7C15)
MIX_1: tl.constexpr = tl.constexpr(0xBF58476D1CE4E5B9)
MIX_2: tl.constexpr = tl.constexpr(0x94D049BB133111EB)
BELOW_ONE: tl.constexpr = tl.constexpr(
    1.0 - 2.0**-24
)  # with u = 1 a token could not be drawn even if it has all the mass


@triton.jit
def mix(x):
    """splitmix64's finaliser, uint64 -> uint64."""
    x = (x ^ (x >> 30)) * MIX_1
    x = (x ^ (x >> 27)) * MIX_2
    return x ^ (x >> 31)


@triton.jit
def exponential(state, ids):
    """Return the Exp(1) noise of the vocabulary ids; accurate near 0, where improbable tokens win."""
    pair = (ids >> 1).to(tl.uint64) + 1
    bits = (mix(state + pair * GOLDEN) >> ((ids & 1) * 32).to(tl.uint64)) & 0x7FFFFFFF
    u = tl.minimum(bits.to(tl.int32).to(tl.float32) * (1 / 2147483648) + (1 / 4294967296), BELOW_ONE)
    # -log1p(-u): seven terms reach fp32 for u < 1/8, above that 1 - u loses nothing
    series = 1 / 4 + u * (1 / 5 + u * (1 / 6 + u * (1 / 7 + u * (1 / 8))))
    series = u * (1.0 + u * (1 / 2 + u * (1 / 3 + u * series)))
    return tl.where(u < 0.125, series, -tl.log(1.0 - u))


def _signed(x: int) -> int:
    """Return the int64 with the same 64 bits."""
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >> 63 else x


def _mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser on int64, in place; the masks make the shifts logical."""
    x.bitwise_xor_((x >> 30).bitwise_and_((1 << 34) - 1)).mul_(_signed(MIX_1.value))
    x.bitwise_xor_((x >> 27).bitwise_and_((1 << 37) - 1)).mul_(_signed(MIX_2.value))
    return x.bitwise_xor_((x >> 31).bitwise_and_((1 << 33) - 1))


def seed_tensor(seed: int | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the seed, 0-d int64 on the device of `like`. A tensor is used as it is, so that a captured graph reads it
    anew at each replay."""
    if isinstance(seed, torch.Tensor):
        check_tensor("seed", seed, (), (torch.int64,), like)
        return seed
    is_int = isinstance(seed, int) and not isinstance(seed, bool)
    require(is_int, "seed", f"must be an int or a 0-d int64 tensor, got {type(seed).__name__}")
    return torch.full((), _signed(seed), device=like.device)


def row_state(seed: torch.Tensor, row_key: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Return [R] int64, the state of the hash for each row at its position."""
    start = _mix(row_key * _signed(GOLDEN.value) + (seed + 1) * _signed(MIX_2.value))
    return _mix(start.add_(position * _signed(GOLDEN.value)))


def negative_noise(state: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Return -E [R, stop - start] fp32 for the vocabulary ids start .. stop; start is even."""
    pair = torch.arange(start // 2 + 1, (stop + 1) // 2 + 1, device=state.device)
    bits = _mix(state[:, None] + pair.mul_(_signed(GOLDEN.value)))
    u = bits.view(torch.int32)[:, : stop - start].bitwise_and_(0x7FFFFFFF).float()
    return u.mul_(-(2.0**-31)).sub_(2.0**-32).clamp_(min=-BELOW_ONE.value).log1p_()


def exponential_noise(
    seed: torch.Tensor, row_key: torch.Tensor, position: torch.Tensor, start: int, stop: int
) -> torch.Tensor:
    """Return E [R, stop - start] fp32, Exp(1) noise of the vocabulary ids start .. stop; start is even."""
    return negative_noise(row_state(seed, row_key, position), start, stop).neg_()
