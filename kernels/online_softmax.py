"""The running statistics of a softmax: max, sum and weighted sum of logits that arrive in parts.

    top = max z;   y = (z - top) scale;   total = sum of 2^y;   mean = sum of 2^y y        scale = log2(e) / temperature
    log-sum-exp = top scale + log2(total) bits;   entropy = log2(total) - mean / total bits

The difference comes before the product: that of large neighbouring logits is exact, that of their products is not.
"""

import math

import torch
import triton
import triton.language as tl

LN_2 = math.log(2.0)
LOG2_E: tl.constexpr = tl.constexpr(1 / LN_2)
BITS_TO_NATS: tl.constexpr = tl.constexpr(LN_2)
LOWEST: tl.constexpr = tl.constexpr(-1e38)  # finite: 0 * -inf would be NaN

LOGITS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""What logits in memory are rounded to."""

ROUND_PAIR: tl.constexpr = tl.constexpr("""{
    .reg .b32 pair;
    cvt.rn.bf16x2.f32 pair, $3, $2;
    shl.b32 $0, pair, 16;
    and.b32 $1, pair, 0xffff0000;
}""")


@triton.jit
def as_in_memory(z, ROUND: tl.constexpr, PAIRS: tl.constexpr):
    """Round fp32 logits to the dtype that they have in memory. PAIRS: two bf16 at a time, which the compiler does not
    do; one by one they go through the unit of the exponentials, and take as long. The interpreter cannot."""
    if PAIRS and ROUND == tl.bfloat16:  # noqa: SIM300
        return tl.inline_asm_elementwise(ROUND_PAIR, "=r,=r,r,r", [z], tl.float32, is_pure=True, pack=2)
    return z.to(ROUND).to(tl.float32)


@triton.jit
def online(top, total, mean, z, scale, ENTROPY: tl.constexpr):
    """Add logits [rows, columns] to the statistics [rows]. Without ENTROPY `mean` stays as it is.
    Columns that do not count hold -inf or `LOWEST`."""
    new_top = tl.maximum(top, tl.max(z, 1))
    below = (z - new_top[:, None]) * scale
    e = tl.exp2(below)
    shift = tl.maximum((top - new_top) * scale, LOWEST)
    rescale = tl.exp2(shift)
    if ENTROPY:
        mean = (mean + total * shift) * rescale + tl.sum(e * tl.maximum(below, LOWEST), 1)
    return new_top, total * rescale + tl.sum(e, 1), mean


@triton.jit
def merge(top, total, mean, other_top, other_total, other_mean, scale, ENTROPY: tl.constexpr):
    """Return the statistics of two sets of logits."""
    new_top = tl.maximum(top, other_top)
    shift = tl.maximum((top - new_top) * scale, LOWEST)
    other_shift = tl.maximum((other_top - new_top) * scale, LOWEST)
    rescale, other_rescale = tl.exp2(shift), tl.exp2(other_shift)
    if ENTROPY:
        mean = (mean + total * shift) * rescale + (other_mean + other_total * other_shift) * other_rescale
    return new_top, total * rescale + other_total * other_rescale, mean


@triton.jit
def across(top, total, mean, scale):
    """Return the statistics of all rows together, from those of each."""
    peak = tl.max(top, 0)
    shift = tl.maximum((top - peak) * scale, LOWEST)
    rescale = tl.exp2(shift)
    return peak, tl.sum(total * rescale, 0), tl.sum((mean + total * shift) * rescale, 0)
