"""lm_head matmul + log-softmax + gather (+ entropy): per-token log-probs without the [N, V] logits.

    z = hidden W^T / T;   logp_n = z_n,y - lse_n;   H_n = lse_n - sum over v of p_nv z_nv
    d z_nv = g_n (1[v = y] - p_nv) - h_n p_nv (log p_nv + H_n)        g, h: incoming gradients

Forward on CUDA: one matmul whose accumulators stay on chip. A work item is 128 tokens x one
vocabulary split of `SPLIT` columns; it keeps the running max, sum of exponentials, their z-weighted sum and
the target logit, all from the same accumulators, rounded to the inputs' dtype as a logit in memory is: the
log-probs of a policy, of its reference and of its sampler are then equal where their weights are. Splits depend on
V alone, so a row's result does not depend on the batch around it. Persistent; TMA + wgmma on sm_90, pointers + mma
on sm_80.
Backward: the gradient is not known in the forward pass, so the backward recomputes the logits chunk by chunk:
four vocabulary matmuls in all (`linear_grpo_loss` needs three).

FLOPs 2NVD a matmul: 2.61 TFLOP = 3.7 ms at 700 TF/s for N = 5,600, V = 151,936, D = 1,536.
Bytes, forward: 2(ND ceil(V/SPLIT) + VD ceil(N/128)) through L2. `GROUP` row blocks take all splits before the
next group starts, so from memory, if a group's rows and one split fit L2: 2(ND + VD ceil(N/6144)).
Written: 16 N ceil(V/SPLIT).
Tolerance: fp32 within 1e-5 of float64; bf16 error not above plain PyTorch bf16's.
Measured on a GPU: not yet.

Shapes: N scored tokens, V vocabulary, D hidden.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from . import checks
from .checks import (
    HEAD_IMPLS,
    IGNORE_INDEX,
    check_head,
    check_target,
    check_temperature,
    choose_impl,
    full_fp32,
    head_inputs,
    interpreted,
    op_scope,
)
from .chunked_logits import Chunk, add_matmul, dlogits_triton, matmul_over_vocabulary
from .chunks import chunk_rows_of, multiprocessors, row_spans, work_item
from .online_softmax import BITS_TO_NATS, LOG2_E, LOGITS, LOWEST, as_in_memory, merge, online

SPLIT = 4096  # vocabulary columns of a work item
GROUP = 48  # row blocks that go through all splits together: their 19 MB at D = 1,536 stay in Hopper's L2
IGNORED_TARGET: tl.constexpr = tl.constexpr(IGNORE_INDEX)

# BLOCK_N, BLOCK_V, BLOCK_D, warps, stages. Two programs fit on a Hopper SM (128 registers, 98 KB each), so
# that the exponentials of one run under the other's matmul; 128 x 256 tiles would leave room for one.
WGMMA_TILE = (128, 128, 64, 8, 3)
PLAIN_TILE = (128, 64, 32, 8, 3)  # 128 columns spill registers on sm_80
FP32_TILE = (64, 64, 16, 8, 2)


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["target_ptr"])
def logprob_kernel(
    hidden,
    weight,
    target_ptr,
    max_ptr,
    sum_ptr,
    mean_ptr,
    target_logit_ptr,  # [splits, N]
    N,
    V,
    D: tl.constexpr,
    inv_temperature,
    num_splits,
    stride_hidden,
    stride_weight,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    ENTROPY: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUND: tl.constexpr,
    PAIRS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """`hidden` and `weight` are tensor descriptors if TMA, else pointers. ROUND: the dtype of logits in memory."""
    scale = inv_temperature * LOG2_E
    lane_n = tl.arange(0, BLOCK_N)
    lane_v = tl.arange(0, BLOCK_V)
    row_blocks = tl.cdiv(N, BLOCK_N)
    for item in range(tl.program_id(0), row_blocks * num_splits, tl.num_programs(0)):
        row_block, split = work_item(item, row_blocks, num_splits, GROUP)
        row = row_block * BLOCK_N
        offs_n = row + lane_n
        in_n = offs_n < N
        if not TMA:
            x_ptr = hidden + row * tl.cast(stride_hidden, tl.int64)
        target = tl.load(target_ptr + offs_n, mask=in_n, other=-1).to(tl.int32)
        top = tl.full([BLOCK_N], LOWEST, tl.float32)
        total = tl.zeros([BLOCK_N], tl.float32)
        mean = tl.zeros([BLOCK_N], tl.float32)
        target_logit = tl.zeros([BLOCK_N], tl.float32)
        for column in range(split * SPLIT, min(split * SPLIT + SPLIT, V), BLOCK_V):
            offs_v = column + lane_v
            if not TMA:  # 64 bits for the tile's corner, 32 inside it
                w_ptr = weight + column * tl.cast(stride_weight, tl.int64)
            acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
            for k in range(0, D, BLOCK_D):
                if TMA:
                    x = hidden.load([row, k])
                    w = weight.load([column, k])
                else:
                    offs_d = k + tl.arange(0, BLOCK_D)
                    in_d = offs_d < D
                    x = tl.load(
                        x_ptr + lane_n[:, None] * stride_hidden + offs_d[None, :],
                        mask=in_n[:, None] & in_d[None, :],
                        other=0.0,
                    )
                    w = tl.load(
                        w_ptr + lane_v[:, None] * stride_weight + offs_d[None, :],
                        mask=(offs_v < V)[:, None] & in_d[None, :],
                        other=0.0,
                    )
                if UPCAST:
                    x = x.to(tl.float32)
                    w = w.to(tl.float32)
                acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
            z = tl.where((offs_v < V)[None, :], as_in_memory(acc, ROUND, PAIRS), LOWEST)
            top, total, mean = online(top, total, mean, z, scale, ENTROPY)
            is_target = offs_v[None, :] == target[:, None]
            target_logit += tl.sum(tl.where(is_target, z, 0.0), 1)
        out = split * N + offs_n
        tl.store(max_ptr + out, top, mask=in_n)
        tl.store(sum_ptr + out, total, mask=in_n)
        if ENTROPY:
            tl.store(mean_ptr + out, mean, mask=in_n)
        tl.store(target_logit_ptr + out, target_logit, mask=in_n)


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["target_ptr"])
def combine_splits_kernel(
    max_ptr,
    sum_ptr,
    mean_ptr,
    target_logit_ptr,
    target_ptr,
    logp_ptr,
    entropy_ptr,
    N,
    inv_temperature,
    num_splits,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Online log-sum-exp over the splits, in their order."""
    scale = inv_temperature * LOG2_E
    offs_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_n = offs_n < N
    top = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    mean = tl.zeros([BLOCK], tl.float32)
    target_logit = tl.zeros([BLOCK], tl.float32)
    split_mean = mean
    for split in range(num_splits):
        at = split * N + offs_n
        split_top = tl.load(max_ptr + at, mask=in_n, other=0.0)
        split_total = tl.load(sum_ptr + at, mask=in_n, other=1.0)
        if ENTROPY:
            split_mean = tl.load(mean_ptr + at, mask=in_n, other=0.0)
        top, total, mean = merge(top, total, mean, split_top, split_total, split_mean, scale, ENTROPY)
        target_logit += tl.load(target_logit_ptr + at, mask=in_n, other=0.0)
    log_total = tl.log2(total)
    scored = tl.load(target_ptr + offs_n, mask=in_n, other=-1) != IGNORED_TARGET
    logp = ((target_logit - top) * scale - log_total) * BITS_TO_NATS
    tl.store(logp_ptr + offs_n, tl.where(scored, logp, 0.0), mask=in_n)
    if ENTROPY:
        entropy = (log_total - mean / total) * BITS_TO_NATS
        tl.store(entropy_ptr + offs_n, tl.where(scored, entropy, 0.0), mask=in_n)


def logprob_launch(hidden: torch.Tensor, weight: torch.Tensor) -> tuple:
    """Return the matrices and constants of `logprob_kernel` that depend on dtype and architecture."""
    hidden, weight = checks.align_rows(hidden, weight)
    is_fp32, tma = hidden.dtype == torch.float32, checks.tma_ready(hidden, weight)
    tile = FP32_TILE if is_fp32 else WGMMA_TILE if tma else PLAIN_TILE
    block_n, block_v, block_d, warps, stages = tile
    matrices = (hidden, weight)
    if tma:
        shapes = ([block_n, block_d], [block_v, block_d])
        matrices = tuple(map(TensorDescriptor.from_tensor, matrices, shapes))
    constants = {
        "D": hidden.shape[1],
        "stride_hidden": hidden.stride(0),
        "stride_weight": weight.stride(0),
        "BLOCK_N": block_n,
        "BLOCK_V": block_v,
        "BLOCK_D": block_d,
        "TMA": tma,
        "PRECISION": "ieee" if is_fp32 else "tf32",
        "num_warps": warps,
        "num_stages": stages,
        "ROUND": LOGITS[hidden.dtype],
        "PAIRS": not interpreted(),
        # Triton's interpreter reads bf16 operands of a dot as integers
        "UPCAST": interpreted() and hidden.dtype == torch.bfloat16,
    }
    return matrices, constants


def _forward_triton(hidden, weight, target, inv_temperature, entropy, logp, ent, gluon: bool) -> None:
    N, V = len(hidden), len(weight)
    if N == 0:
        return
    splits = triton.cdiv(V, SPLIT)
    statistics = tuple(logp.new_empty(splits, N) for _ in range(4))
    if gluon:
        from .gluon_logprob import gluon_statistics

        gluon_statistics(hidden, weight, target, inv_temperature, entropy, SPLIT, statistics)
    else:
        _statistics_triton(hidden, weight, target, inv_temperature, entropy, statistics)
    combine_splits_kernel[(triton.cdiv(N, 128),)](
        *statistics, target, logp, ent, N, inv_temperature, splits, ENTROPY=entropy, BLOCK=128
    )


def _statistics_triton(hidden, weight, target, inv_temperature, entropy, out) -> None:
    """Fill `out`: top, total, mean and target logit [splits, N] of each split."""
    (N, V), splits = (len(hidden), len(weight)), len(out[0])
    (x, w), constants = logprob_launch(hidden, weight)
    items = triton.cdiv(N, constants["BLOCK_N"]) * splits
    programs = 2 * multiprocessors(hidden.device) if hidden.is_cuda else 4
    logprob_kernel[(min(items, programs),)](
        x,
        w,
        target,
        *out,
        N=N,
        V=V,
        inv_temperature=inv_temperature,
        num_splits=splits,
        SPLIT=SPLIT,
        GROUP=GROUP,
        ENTROPY=entropy,
        **constants,
    )


def _forward_torch(hidden, weight, target, inv_temperature, entropy, logp, ent) -> None:
    rows = chunk_rows_of(hidden, weight)
    safe = target.clamp(min=0)
    chunk = Chunk(rows, weight.float(), inv_temperature)
    for a, b in row_spans(len(hidden), rows):
        logp[a:b], h = chunk(hidden[a:b], safe[a:b], entropy)
        if entropy:
            ent[a:b] = h
    for out in (logp, ent) if entropy else (logp,):
        out.masked_fill_(target == IGNORE_INDEX, 0.0)


def _backward_chunks(ctx, g, h, d_hidden: torch.Tensor | None, d_weight: torch.Tensor | None):
    """Fill `d_hidden` and add to `d_weight`; either may be None."""
    hidden, weight, target, ent = ctx.saved_tensors
    N, V = hidden.shape[0], weight.shape[0]
    rows = chunk_rows_of(hidden, weight)
    if ctx.on_cpu:
        w = weight.float()
        chunk, safe = Chunk(rows, w, ctx.inv_temperature), target.clamp(min=0)
    else:
        w, logits = weight, weight.new_empty(rows, V)
    for a, b in row_spans(N, rows):
        x = hidden[a:b]
        if ctx.on_cpu:
            chunk(x, safe[a:b], entropy=False)
            ent_ab, h_ab = (None, None) if h is None else (ent[a:b], h[a:b])
            d = chunk.dlogits(g[a:b], safe[a:b], h_ab, ent_ab)
        else:
            z = torch.mm(x, w.t(), out=logits[: b - a])
            d = dlogits_triton(z, a, target, g, ctx.inv_temperature, h)
        if d_hidden is not None:
            d_hidden[a:b] = matmul_over_vocabulary(d, w)
        if d_weight is not None:
            add_matmul(d_weight, d.t(), x, overwrite=a == 0)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, inv_temperature: float, entropy: bool, impl: str):
        logp = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        ent = torch.empty_like(logp) if entropy else None
        arguments = (hidden, weight, target, inv_temperature, entropy, logp, logp if ent is None else ent)
        if impl == "torch":
            _forward_torch(*arguments)
        else:
            _forward_triton(*arguments, gluon=impl == "gluon")
        ctx.save_for_backward(hidden, weight, target, ent)
        ctx.inv_temperature, ctx.on_cpu = inv_temperature, impl == "torch"
        ctx.set_materialize_grads(False)
        return logp, ent

    @staticmethod
    @once_differentiable
    @op_scope
    @full_fp32()
    def backward(ctx, grad_logp, grad_entropy):
        hidden, weight, target, *_ = ctx.saved_tensors
        if grad_logp is None and grad_entropy is None:
            return (None,) * 6
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        scored = target != IGNORE_INDEX
        g = torch.zeros_like(scored, dtype=torch.float32) if grad_logp is None else grad_logp * scored
        h = None if grad_entropy is None else grad_entropy * scored
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        make = torch.empty_like if len(hidden) else torch.zeros_like  # the first chunk overwrites it
        d_weight = make(weight, dtype=torch.float32) if need_weight else None
        _backward_chunks(ctx, g, h, d_hidden, d_weight)
        # cast here, where the chunk's logits are freed already: the cast needs memory of its own
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None, None


@op_scope
@full_fp32()
def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Return the log-prob of each target under softmax(hidden @ weight.T / temperature); differentiable.

    Args:
        hidden: [N, D] bf16, fp16 or fp32.
        weight: [V, D], the lm_head, same dtype. Frozen (or tied to an embedding) is fine.
        target: [N] int64; -100 = ignored: log-prob 0, no gradient.
        temperature: divides the logits.
        entropy: also return the entropy of the softmax, differentiable as well.
        impl: auto | triton | torch | reference | gluon (gluon_logprob.py: sm_90, bf16 or fp16; not measured yet).

    Returns:
        logp [N] fp32, or (logp, entropy [N] fp32).
    """
    impl = choose_impl(impl, hidden, impls=HEAD_IMPLS)
    check_head(hidden, weight, impl)
    check_target(target, hidden, weight.shape[0])
    check_temperature(temperature)
    if impl == "reference":
        from . import reference

        return reference.linear_logprob(hidden, weight, target, temperature=temperature, entropy=entropy)
    hidden, weight, target = head_inputs(impl, hidden, weight, target)
    logp, ent = _LinearLogprob.apply(hidden, weight, target, 1.0 / temperature, entropy, impl)
    return (logp, ent) if entropy else logp
