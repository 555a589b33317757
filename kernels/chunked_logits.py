"""Rows of logits in memory, one chunk of tokens at a time: for the backward of `linear_logprob`, and for forward and
backward of `linear_grpo_loss`.

    p_v = softmax(z / T);   d z_v = (g (1[v = y] - p_v) - h p_v (log p_v + H)) / T

Triton: one program per row reads it twice (the second time from L2) and writes it once: 6 bytes per bf16 logit,
no matmul. The CPU's `Chunk` does the same in two buffers.
The softmax is always computed from these rounded logits: for a token of probability near 1, p - 1 is near 0 only if
both come from the same numbers.
Measured on a GPU: not yet.

Shapes: N tokens, V vocabulary.
"""

import functools
import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

LN_2 = math.log(2.0)
CPU_CHUNK_BYTES = 1 << 26  # of fp32 logits at a time: small problems run as one chunk
CUDA_CHUNK_BYTES = 1 << 30  # with the fp32 d_weight of a 152k x 1,536 head this stays below 2.3 GB


@triton.jit
def row_statistics(row_ptr, V, inv_temperature, BLOCK: tl.constexpr):
    """Return max, sum of e^(z - max), and sum of e^(z - max) (z - max) of a row of logits."""
    lane = tl.arange(0, BLOCK)
    top = -1e38  # finite: 0 * -inf would be NaN
    total = 0.0
    mean = 0.0
    for column in range(0, V, BLOCK):
        in_v = column + lane < V
        z = tl.load(row_ptr + column + lane, mask=in_v, other=0.0).to(tl.float32)
        z = tl.where(in_v, z * inv_temperature, -1e38)
        new_top = tl.maximum(top, tl.max(z, 0))
        rescale = tl.exp(top - new_top)
        e = tl.exp(z - new_top)
        mean = (mean + total * (top - new_top)) * rescale + tl.sum(e * (z - new_top), 0)
        total = total * rescale + tl.sum(e, 0)
        top = new_top
    return top, total, mean


@triton.jit
def write_dlogits(
    row_ptr, V, target, top, log_total, entropy, g, h, inv_temperature, ENTROPY: tl.constexpr, BLOCK: tl.constexpr
):
    """Overwrite a row of raw logits with g (1_y - p) - h p (log p + H), chained through the temperature."""
    lane = tl.arange(0, BLOCK)
    for column in range(0, V, BLOCK):
        offs_v = column + lane
        z = tl.load(row_ptr + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)
        log_p = (z * inv_temperature - top) - log_total
        p = tl.exp(log_p)
        d = tl.where(offs_v == target, g, 0.0) - g * p
        if ENTROPY:
            d -= h * p * (log_p + entropy)
        d = (d * inv_temperature).to(row_ptr.dtype.element_ty)
        tl.store(row_ptr + offs_v, d, mask=offs_v < V)


@triton.jit
def dlogits_kernel(
    logits_ptr,
    target_ptr,
    grad_logp_ptr,
    grad_entropy_ptr,
    V,
    stride_logits,
    inv_temperature,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row."""
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * stride_logits
    top, total, mean = row_statistics(row_ptr, V, inv_temperature, BLOCK)
    log_total = tl.log(total)
    h = 0.0
    if ENTROPY:
        h = tl.load(grad_entropy_ptr + row)
    write_dlogits(
        row_ptr,
        V,
        tl.load(target_ptr + row),
        top,
        log_total,
        log_total - mean / total,
        tl.load(grad_logp_ptr + row),
        h,
        inv_temperature,
        ENTROPY,
        BLOCK,
    )


def row_config(V: int) -> dict[str, int]:
    """Return the launch options of the row kernels for V logits per row."""
    block = min(8192, triton.next_power_of_2(V))
    return {"BLOCK": block, "num_warps": max(4, min(16, block // 512))}


def chunk_rows(num_rows: int, vocab_size: int, itemsize: int, device_type: str) -> int:
    """Rows whose logits exist at once: equal chunks within the budget, so that none is a small rest.
    Below 32, reading and writing d_weight would cost more than a chunk's matmul. `itemsize`: bytes of a weight."""
    budget, step = CPU_CHUNK_BYTES, 1
    if device_type == "cuda":
        budget, step = CUDA_CHUNK_BYTES, 128
    else:
        itemsize = 4  # the CPU path computes in fp32
    most = max(32, budget // (itemsize * vocab_size))
    step = step if most >= step else 1
    most -= most % step
    even = triton.cdiv(num_rows, max(1, triton.cdiv(num_rows, most)))
    return min(max(1, triton.cdiv(even, step) * step), max(num_rows, 1))


def row_spans(N: int, rows: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + rows, N)) for start in range(0, N, rows))


def add_matmul(acc: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """acc += a @ b for an fp32 acc, without rounding the product to the inputs' dtype first."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(acc, a, b, out_dtype=torch.float32, out=acc)
    else:
        acc.addmm_(a.float(), b.float())


def matmul_over_vocabulary(d: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return d [n, V] @ weight [V, D]. CPU BLAS sums 152k products one after the other, which loses two digits; partial
    sums keep them."""
    if d.is_cuda:
        return d @ weight
    parts = zip(d.split(1 << 15, dim=1), weight.split(1 << 15), strict=True)
    return functools.reduce(torch.Tensor.add_, (a @ b for a, b in parts))


class Chunk:
    """The two [rows, V] buffers of the CPU path, and the softmax statistics of one chunk of tokens.

    Logits are in bits, not nats: torch's exp2 and log1p run at memory speed on a CPU, its exp takes twice as
    long and its log stalls on MKL's threads. Sums are torch's own, which cascade: the running sum inside
    torch.softmax is off by 1e-5 at V = 152k."""

    def __init__(self, rows: int, weight: torch.Tensor, inv_temperature: float) -> None:
        self.weight, self.inv_temperature = weight, inv_temperature
        self.logits = weight.new_empty(rows, weight.shape[0])
        self.exp = torch.empty_like(self.logits)
        self.total = self.log_total = weight.new_empty(0)  # [rows] of the latest chunk

    def __call__(
        self, hidden: torch.Tensor, target: torch.Tensor, entropy: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return log-probs and entropy. Leaves z - max in `logits` (entropy overwrites it) and its exp in `exp`."""
        n = hidden.shape[0]
        x = hidden.float() * (self.inv_temperature / LN_2)
        z = torch.mm(x, self.weight.t(), out=self.logits[:n])
        z.sub_(z.amax(1, keepdim=True))  # relative to the max, so that large logits cost no digits
        e = torch.exp2(z, out=self.exp[:n])
        self.total = e.sum(1)
        self.log_total = (self.total - 1.0).log1p_()  # the max itself contributes 1
        logp = z.gather(1, target[:, None])[:, 0] * LN_2 - self.log_total
        if not entropy:
            return logp, None
        # e = 0 meets a finite z, so no -inf appears
        return logp, self.log_total - z.mul_(e).sum(1).mul_(LN_2).div_(self.total)

    def dlogits(
        self,
        g: torch.Tensor,
        target: torch.Tensor,
        h: torch.Tensor | None = None,
        entropy: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return g (1_y - p) - h p (log p + H), chained through the temperature, in the `exp` buffer. `rows` selects
        some of the chunk's rows. `h` comes with `entropy`."""
        e, total = self.exp[: len(g)], self.total
        if rows is not None:
            e, g, total, target = e[rows], g[rows], total[rows], target[rows]
        g, total = g[:, None] * self.inv_temperature, total[:, None]
        if h is None or entropy is None:
            e.mul_(-g / total)
        else:
            h = h[:, None] * self.inv_temperature
            z = self.logits[: len(e)].mul_(LN_2).add_((entropy - self.log_total)[:, None])
            e.mul_(z.mul_(h).add_(g)).div_(-total)
        return e.scatter_add_(1, target[:, None], g)


def dlogits_triton(
    logits: torch.Tensor, target: torch.Tensor, g: torch.Tensor, h: torch.Tensor | None, inv_temperature: float
) -> torch.Tensor:
    """Replace raw logits [n, V] by their gradient, in place."""
    dlogits_kernel[(len(logits),)](
        logits,
        target,
        g,
        g if h is None else h,
        logits.shape[1],
        logits.stride(0),
        inv_temperature,
        ENTROPY=h is not None,
        **row_config(logits.shape[1]),
    )
    return logits
