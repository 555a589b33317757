"""Rows of logits in memory, one chunk of tokens at a time: for the backward of `linear_logprob`, and for forward and
backward of `linear_grpo_loss`.

    p_v = softmax(z / T);   d z_v = (g (1[v = y] - p_v) - h p_v (log p_v + H)) / T

If the log-sum-exp is known, a row is read and written once; else its statistics come from a pass of their own, so it
is read twice: 4 or 6 bytes per bf16 logit, no matmul. The CPU's `Chunk` does the same in PyTorch.
The softmax is always computed from these rounded logits: for a token of probability near 1, p - 1 is near 0 only if
both come from the same numbers.
Measured on a GPU: not yet.

Shapes: N tokens, n tokens of a chunk, V vocabulary, D hidden.
"""

import functools

import torch
import triton
import triton.language as tl

from .online_softmax import BITS_TO_NATS, LN_2, LOG2_E, LOWEST, across, online

PER_THREAD: tl.constexpr = tl.constexpr(8)  # neighbouring logits: 16 bytes in half precision


@triton.jit
def row_lanes(BLOCK: tl.constexpr):
    """Offsets [BLOCK / 8, 8] within a block of a row, so that statistics of [BLOCK / 8] stay in their threads."""
    return tl.arange(0, BLOCK // PER_THREAD)[:, None] * PER_THREAD + tl.arange(0, PER_THREAD)[None, :]


@triton.jit
def row_statistics(row_ptr, V, scale, BLOCK: tl.constexpr):
    """Return top, total and mean (online_softmax.py) of a row of logits."""
    lane = row_lanes(BLOCK)
    top = tl.full([BLOCK // PER_THREAD], LOWEST, tl.float32)
    total = tl.zeros([BLOCK // PER_THREAD], tl.float32)
    mean = tl.zeros([BLOCK // PER_THREAD], tl.float32)
    for column in tl.range(0, V, BLOCK, num_stages=3):
        z = tl.load(row_ptr + column + lane, mask=column + lane < V, other=-float("inf")).to(tl.float32)
        top, total, mean = online(top, total, mean, z, scale, True)
    return across(top, total, mean, scale)


@triton.jit
def exp_row(row_ptr, V, scale, offset, BLOCK: tl.constexpr):
    """Overwrite a row of logits z with 2^(z scale - offset); return their sum and their sum times the exponents."""
    lane = row_lanes(BLOCK)
    total = tl.zeros([BLOCK // PER_THREAD], tl.float32)
    mean = tl.zeros([BLOCK // PER_THREAD], tl.float32)
    for column in tl.range(0, V, BLOCK, num_stages=3):
        z = tl.load(row_ptr + column + lane, mask=column + lane < V, other=-1e30).to(tl.float32)
        z = z * scale - offset
        e = tl.exp2(z)
        total += tl.sum(e, 1)
        mean += tl.sum(e * z, 1)
        tl.store(row_ptr + column + lane, e.to(row_ptr.dtype.element_ty), mask=column + lane < V)
    return tl.sum(total, 0), tl.sum(mean, 0)


@triton.jit
def write_dlogits(
    row_ptr,
    V,
    target,
    scored,
    top,
    log_total,
    entropy,
    g,
    h,
    inv_temperature,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Overwrite a row of raw logits with g (1_y - p) - h p (log p + H), chained through the temperature; with 0 if the
    token is not `scored`. `top` and `log_total` are the row's statistics (online_softmax.py); `entropy` in nats."""
    lane = row_lanes(BLOCK)
    scale = inv_temperature * LOG2_E
    target_z = tl.load(row_ptr + target, mask=scored, other=0.0).to(tl.float32)
    target_z = (target_z - top) * scale - log_total
    g = tl.where(scored, g, 0.0) * inv_temperature
    h = tl.where(scored, h, 0.0) * inv_temperature
    log_total = tl.where(scored, log_total, 1e30)
    tl.debug_barrier()  # every thread has read the target's logit before one overwrites it
    for column in tl.range(0, V, BLOCK, num_stages=3):
        inside = column + lane < V
        z = tl.load(row_ptr + column + lane, mask=inside, other=0.0).to(tl.float32)
        z = (z - top) * scale - log_total
        factor = -g
        if ENTROPY:
            factor -= h * (tl.maximum(z, -1e30) * BITS_TO_NATS + entropy)
        tl.store(row_ptr + column + lane, (tl.exp2(z) * factor).to(row_ptr.dtype.element_ty), mask=inside)
    factor = -g
    if ENTROPY:
        factor -= h * (target_z * BITS_TO_NATS + entropy)
    tl.debug_barrier()  # the target's element was written by another thread
    tl.store(row_ptr + target, (g + tl.exp2(target_z) * factor).to(row_ptr.dtype.element_ty), mask=scored)


@triton.jit(do_not_specialize=["first"], do_not_specialize_on_alignment=["target_ptr"])
def dlogits_kernel(
    logits_ptr,  # [n, V]: this chunk
    target_ptr,
    top_ptr,
    total_ptr,
    grad_logp_ptr,
    grad_entropy_ptr,  # [N]
    first,
    V,
    stride_logits,
    inv_temperature,
    KNOWN: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row. KNOWN: its statistics, which are those of these very logits."""
    row = tl.program_id(0)
    token = first + row
    row_ptr = logits_ptr + row.to(tl.int64) * stride_logits
    target = tl.load(target_ptr + token)
    if KNOWN:
        top, total, mean = tl.load(top_ptr + token), tl.load(total_ptr + token), 0.0
    else:
        top, total, mean = row_statistics(row_ptr, V, inv_temperature * LOG2_E, BLOCK)
    log_total = tl.log2(total)
    h = 0.0
    if ENTROPY:
        h = tl.load(grad_entropy_ptr + token)
    write_dlogits(
        row_ptr,
        V,
        target,
        (target >= 0) & (target < V),
        top,
        log_total,
        (log_total - mean / total) * BITS_TO_NATS,
        tl.load(grad_logp_ptr + token),
        h,
        inv_temperature,
        ENTROPY,
        BLOCK,
    )


def row_config(logits: torch.Tensor) -> dict[str, int]:
    """Return the launch options of the row kernels for logits [n, V]: blocks of 16 KB at most, more would spill."""
    block = max(16, min(16384 // logits.element_size(), triton.next_power_of_2(logits.shape[1])))
    return {"BLOCK": block, "num_warps": max(4, min(16, block // 512))}


def dlogits_triton(
    logits: torch.Tensor,
    first: int,
    target: torch.Tensor,
    g: torch.Tensor,
    inv_temperature: float,
    h: torch.Tensor | None = None,
    statistics: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Replace the raw logits [n, V] of the tokens from `first` on by their gradient, in place. The others are [N];
    `statistics`: top and total (online_softmax.py) of these rows, if known; not with `h`."""
    assert h is None or statistics is None
    dlogits_kernel[(len(logits),)](
        logits,
        target,
        *((g, g) if statistics is None else statistics),
        g,
        g if h is None else h,
        first,
        logits.shape[1],
        logits.stride(0),
        inv_temperature,
        KNOWN=statistics is not None,
        ENTROPY=h is not None,
        **row_config(logits),
    )
    return logits


@triton.jit(do_not_specialize=["n"])
def scale_rows_kernel(x_ptr, factor_ptr, out_ptr, n, D, stride_factor, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One program per tile: out = x * factor, in out's dtype."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    factor = tl.load(factor_ptr + rows * stride_factor, mask=rows < n, other=0.0)
    offset = rows[:, None].to(tl.int64) * D + columns[None, :]
    inside = (rows < n)[:, None] & (columns < D)[None, :]
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32) * factor[:, None]
    tl.store(out_ptr + offset, x.to(out_ptr.dtype.element_ty), mask=inside)


def scale_rows(x: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype, impl: str) -> torch.Tensor:
    """Return x [n, D] times a factor [n] or 0-d in fp32, as a new tensor of this dtype. The product is rounded once."""
    out = torch.empty_like(x, dtype=dtype)
    if impl != "torch" and x.numel():
        factor, (n, D) = factor.float().expand(len(x)), x.shape
        grid = (triton.cdiv(n, 16), triton.cdiv(D, 256))
        scale_rows_kernel[grid](x, factor, out, n, D, factor.stride(0), ROWS=16, COLUMNS=256)
        return out
    return torch.mul(x, factor if factor.dim() == 0 else factor[:, None], out=out)


def add_matmul(acc: torch.Tensor, a: torch.Tensor, b: torch.Tensor, overwrite: bool) -> None:
    """acc += a @ b for an fp32 acc, without rounding the product to the inputs' dtype first. `overwrite`: acc = a @ b,
    whatever acc holds."""
    if a.is_cuda and a.dtype != torch.float32:
        if overwrite:
            torch.mm(a, b, out_dtype=torch.float32, out=acc)
        else:
            torch.addmm(acc, a, b, out_dtype=torch.float32, out=acc)
    elif overwrite:
        torch.mm(a.float(), b.float(), out=acc)
    else:
        acc.addmm_(a.float(), b.float())


def matmul_over_vocabulary(d: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return d [n, V] @ weight [V, D] in fp32, summed in fp32: a cuBLAS product in half precision may add partial sums
    in half precision. CPU BLAS sums 152k products one after the other, which loses two digits; parts keep them."""
    if d.is_cuda:
        return torch.mm(d, weight, out_dtype=torch.float32) if d.dtype != torch.float32 else d @ weight
    parts = zip(d.split(1 << 15, dim=1), weight.split(1 << 15), strict=True)
    return functools.reduce(torch.Tensor.add_, (a.float() @ b.float() for a, b in parts))


class Chunk:
    """The [rows, V] buffers of the CPU path, and the softmax statistics of one chunk of tokens.

    Logits are in bits, not nats: torch's exp2 and log1p run at memory speed on a CPU, its exp takes twice as
    long and its log stalls on MKL's threads. Sums are torch's own, which cascade: the running sum inside
    torch.softmax is off by 1e-5 at V = 152k."""

    def __init__(self, rows: int, weight: torch.Tensor, inv_temperature: float) -> None:
        self.weight, self.inv_temperature = weight, inv_temperature
        self.exp = weight.new_empty(rows, weight.shape[0])
        self.logits = torch.empty_like(self.exp)
        self.total = self.log_total = weight.new_empty(0)  # [rows] of the latest chunk

    def _scaled(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.float() * (self.inv_temperature / LN_2)

    def __call__(
        self, hidden: torch.Tensor, target: torch.Tensor, entropy: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return log-probs and entropy. Leaves z - max in `logits` (entropy overwrites it) and its exp in `exp`."""
        n = hidden.shape[0]
        z = torch.mm(self._scaled(hidden), self.weight.t(), out=self.logits[:n])
        z.sub_(z.amax(1, keepdim=True))  # relative to the max, so that large logits cost no digits
        e = torch.exp2(z, out=self.exp[:n])
        self.total = e.sum(1)
        self.log_total = (self.total - 1.0).log1p_()  # the max itself contributes 1
        logp = z.gather(1, target[:, None])[:, 0] * LN_2 - self.log_total
        if not entropy:
            return logp, None
        # e = 0 meets a finite z, so no -inf appears
        return logp, self.log_total - z.mul_(e).sum(1).mul_(LN_2).div_(self.total)

    def one_pass(
        self, hidden: torch.Tensor, target: torch.Tensor, offset: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probs and entropy, given `offset` [n] in bits near the log-sum-exp. Leaves e = 2^(z - offset) in
        `exp`, its sum in `total`, and e - total in the targets' places."""
        n = len(hidden)
        # the matmul subtracts the offset
        z = torch.addmm(-offset[:, None], self._scaled(hidden), self.weight.t(), out=self.logits[:n])
        z_target = z.gather(1, target[:, None])[:, 0]
        e = torch.exp2(z, out=self.exp[:n])
        self.total = e.sum(1)
        log_total = self.total.log2()
        mean = z.mul_(e).sum(1) / self.total
        e.scatter_add_(1, target[:, None], -self.total[:, None])
        return (z_target - log_total) * LN_2, (log_total - mean) * LN_2

    def dlogits(
        self, g: torch.Tensor, target: torch.Tensor, h: torch.Tensor | None = None, entropy: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return g (1_y - p) - h p (log p + H), chained through the temperature, in the `exp` buffer. `h` comes with
        `entropy`."""
        e, total = self.exp[: len(g)], self.total[:, None]
        g = g[:, None] * self.inv_temperature
        if h is None or entropy is None:
            e.mul_(-g / total)
        else:
            h = h[:, None] * self.inv_temperature
            z = self.logits[: len(e)].mul_(LN_2).add_((entropy - self.log_total)[:, None])
            e.mul_(z.mul_(h).add_(g)).div_(-total)
        return e.scatter_add_(1, target[:, None], g)
