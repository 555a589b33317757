"""Attention of one new token a row over keys and values in pages, the first of which a row may share with its group.

    out_r = softmax(q_r k_r^T scale) v_r        k_r, v_r: the first `lengths[r]` tokens of the row's pages

Rows of a group stand next to each other and begin with the same `shared[r]` pages (their prompt's). Those are read
once for the whole group: G rows of H / K query heads to a key head are one matmul against the prompt.

On CUDA three launches, split over the context so that few rows fill the GPU: shared pages by group, own pages by row,
and the sum of all parts. Grids and splits depend on R alone and every length is read on the device, so that the op
can be captured in a graph; nothing is summed by atomics.

Bytes: 2 K d for every token of every shared prefix once and of every row's own pages once.
Tolerance: fp32 within 1e-5 of float64; bf16 error not above plain PyTorch bf16's.
Measured on a GPU: not yet.

Shapes: R rows, H query heads, K key heads, d head size, B pages in the pool, n pages of a row's table.
"""

import torch
import triton
import triton.language as tl

from . import checks
from .checks import FLOATS, REFERENCE_FLOATS, check_tensor, choose_impl, interpreted, op_scope, require
from .pages import Gathered, Pages

MOST_QUERIES = 64  # queries (rows x heads) of a group in one program; wgmma's least
BLOCK_TOKENS = 64
PROGRAMS = 528  # enough to fill 132 multiprocessors four times
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def paged_attention_kernel(
    query_ptr,
    keys_ptr,
    values_ptr,
    table_ptr,
    lengths_ptr,
    group_ptr,
    place_ptr,
    shared_ptr,
    peak_ptr,
    total_ptr,
    sum_ptr,  # [R, H, parts], [R, H, parts], [R, H, parts, d]
    R,
    n,
    scale,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    FIRST: tl.constexpr,
    PARTS: tl.constexpr,
    PAGE: tl.constexpr,
    K: tl.constexpr,
    REP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One program: a key head, a stretch of the context, and the queries of one row, or (SHARED) of the up to ROWS rows
    of a group from here on, if this row is the first of such a block. Leaves an unnormalised part of the softmax."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    if SHARED and tl.load(place_ptr + row) % ROWS != 0:
        return
    lane = tl.arange(0, BLOCK_M)
    rows = row + lane // REP
    mine = (lane < ROWS * REP) & (rows < R)
    shared = tl.load(shared_ptr + row) * PAGE
    if SHARED:
        mine &= tl.load(group_ptr + rows, mask=mine, other=-1) == tl.load(group_ptr + row)
        begin, end = 0, shared
    else:
        begin, end = shared, tl.load(lengths_ptr + row)
    step = tl.cdiv(tl.cdiv(end - begin, SPLITS), BLOCK_N) * BLOCK_N
    begin += split * step
    end = tl.minimum(end, begin + step)

    offs_d = tl.arange(0, BLOCK_D)
    in_d = offs_d < D
    heads = rows.to(tl.int64) * (K * REP) + head * REP + lane % REP
    q = tl.load(query_ptr + heads[:, None] * D + offs_d[None, :], mask=mine[:, None] & in_d[None, :], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    peak = tl.full([BLOCK_M], -1e38, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(begin, end, BLOCK_N):
        token = first + tl.arange(0, BLOCK_N)
        seen = token < end
        page = tl.load(table_ptr + row * n + token // PAGE, mask=seen, other=0).to(tl.int64)
        slot = (page * PAGE + token % PAGE) * K + head
        at = slot[:, None] * D + offs_d[None, :]
        k = tl.load(keys_ptr + at, mask=seen[:, None] & in_d[None, :], other=0.0)
        v = tl.load(values_ptr + at, mask=seen[:, None] & in_d[None, :], other=0.0)
        if UPCAST:
            k, v = k.to(tl.float32), v.to(tl.float32)
        z = tl.dot(q, k.T, input_precision=PRECISION) * (scale * LOG2_E)
        z = tl.where(seen[None, :], z, -1e38)
        top = tl.maximum(peak, tl.max(z, 1))
        e = tl.where(seen[None, :], tl.exp2(z - top[:, None]), 0.0)
        shrink = tl.exp2(peak - top)
        total = total * shrink + tl.sum(e, 1)
        acc = acc * shrink[:, None] + tl.dot(e.to(v.dtype), v, input_precision=PRECISION)
        peak = top
    part = heads * PARTS + FIRST + split
    tl.store(peak_ptr + part, peak, mask=mine)
    tl.store(total_ptr + part, total, mask=mine)
    tl.store(sum_ptr + part[:, None] * D + offs_d[None, :], acc, mask=mine[:, None] & in_d[None, :])


@triton.jit
def combine_parts_kernel(
    peak_ptr,
    total_ptr,
    sum_ptr,
    out_ptr,
    PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program a row and head: the parts, brought to the same scale, over their total."""
    at = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK_P)
    offs_d = tl.arange(0, BLOCK_D)
    here, in_d = part < PARTS, offs_d < D
    peak = tl.load(peak_ptr + at * PARTS + part, mask=here, other=-1e38)
    total = tl.load(total_ptr + at * PARTS + part, mask=here, other=0.0)
    x = tl.load(
        sum_ptr + (at * PARTS + part)[:, None] * D + offs_d[None, :], mask=here[:, None] & in_d[None, :], other=0.0
    )
    weight = tl.exp2(peak - tl.max(peak, 0))
    out = tl.sum(x * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out_ptr + at * D + offs_d, out, mask=in_d)


@op_scope
@torch.no_grad()
def paged_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pages: Pages,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """One query token a row over its pages. No gradient.

    Args:
        query: [R, H, d].
        keys: [B, page, K, d].
        values: [B, page, K, d].
        pages: which of them each row sees.
        scale: of the scores; None means 1 / sqrt(d).
        impl: auto | triton | torch | reference.

    Returns:
        [R, H, d] in query's dtype.
    """
    impl = choose_impl(impl, query, "query")
    if not checks.trusting():
        _check(query, keys, values, pages, impl)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if len(query) == 0:
        return query.clone()
    if impl == "reference":
        from . import reference

        return reference.paged_attention(query, keys, values, pages, scale=scale)
    if impl == "triton":
        return _paged_triton(query.contiguous(), keys.contiguous(), values.contiguous(), pages, scale)
    return _gathered(query, keys, values, pages.gathered, pages.memory, scale)


def _check(query, keys, values, pages: Pages, impl: str) -> None:
    dtypes = REFERENCE_FLOATS if impl == "reference" else FLOATS
    check_tensor("query", query, (len(pages.lengths), None, None), dtypes, query)
    _, H, d = query.shape
    check_tensor("keys", keys, (None, pages.page, None, d), (query.dtype,), query)
    check_tensor("values", values, tuple(keys.shape), (query.dtype,), query)
    require(H % keys.shape[2] == 0, "keys", f"{keys.shape[2]} heads do not divide query's {H}")


def _paged_triton(query, keys, values, pages: Pages, scale: float) -> torch.Tensor:
    (R, H, D), K = query.shape, keys.shape[2]
    rep = H // K
    is_fp32 = query.dtype == torch.float32
    most = 16 if is_fp32 else MOST_QUERIES if checks.capability(query) >= 90 else MOST_QUERIES // 2
    rows = max(1, most // rep)  # more would not fit into the registers
    splits = max(1, min(8, PROGRAMS // (R * K)))
    parts = 2 * splits
    peak, total = query.new_empty(2, R, H, parts, dtype=torch.float32)
    sums, out = query.new_empty(R, H, parts, D, dtype=torch.float32), torch.empty_like(query)
    constants = {
        "SPLITS": splits,
        "PARTS": parts,
        "PAGE": pages.page,
        "K": K,
        "REP": rep,
        "D": D,
        "BLOCK_N": 32 if is_fp32 else BLOCK_TOKENS,
        "BLOCK_D": max(16, triton.next_power_of_2(D)),
        "PRECISION": "ieee" if is_fp32 else "tf32",
        "UPCAST": interpreted() and not is_fp32,
    }
    block_table = pages.block_table.contiguous()
    for is_shared, of in ((True, rows), (False, 1)):
        paged_attention_kernel[(R, K, splits)](
            query,
            keys,
            values,
            block_table,
            pages.lengths,
            pages.group,
            pages.place,
            pages.shared,
            peak,
            total,
            sums,
            R,
            block_table.shape[1],
            scale,
            SHARED=is_shared,
            ROWS=of,
            FIRST=0 if is_shared else splits,
            BLOCK_M=max(16, triton.next_power_of_2(of * rep)),
            **constants,
        )
    combine_parts_kernel[(R * H,)](
        peak,
        total,
        sums,
        out,
        PARTS=parts,
        BLOCK_P=triton.next_power_of_2(parts),
        D=D,
        BLOCK_D=triton.next_power_of_2(D),
    )
    return out


def _own(pool: torch.Tensor, at: Gathered) -> torch.Tensor:
    """[R, own tokens, K, d]; a view of the pool where rows lie at equal distances."""
    _, page, K, d = pool.shape
    if not at.apart:
        return pool.index_select(0, at.own).view(-1, at.m * page, K, d)
    R, size = len(at.own) // at.m, page * K * d
    stride = (at.apart * size, K * d, d, 1)
    return pool.as_strided((R, at.m * page, K, d), stride, pool.storage_offset() + at.first_own * size)


def _shared(keys, values, at: Gathered, memory: dict | None) -> tuple[torch.Tensor, torch.Tensor]:
    """[G, shared tokens, K, d] each"""
    found = None if memory is None else memory.get(keys.data_ptr())
    if found is None:
        found = tuple(x.index_select(0, at.shared).view(at.G, -1, *x.shape[2:]) for x in (keys, values))
        if memory is not None:
            memory[keys.data_ptr()] = found
    return found


def _gathered(query, keys, values, at: Gathered, memory, scale: float) -> torch.Tensor:
    """Scores against the shared and the own pages side by side under one softmax."""
    H, (_, page, K, _) = query.shape[1], keys.shape
    rep, G, most, border = H // K, at.G, at.most, at.n * page
    own_k, own_v = _own(keys, at), _own(values, at)
    if border:
        shared_k, shared_v = _shared(keys, values, at, memory)

    def by_group(x: torch.Tensor) -> torch.Tensor:
        """[R, rep, ...] -> [G, most * rep, ...]"""
        if not at.regular:
            x = x.new_zeros(G * most, *x.shape[1:]).index_copy_(0, at.slot, x)
        return x.reshape(G, most * rep, -1)

    def by_row(x: torch.Tensor) -> torch.Tensor:
        x = x.view(G * most, rep, -1)
        return x if at.regular else x.index_select(0, at.slot)

    query, out = query * scale, torch.empty_like(query)
    for head in range(K):  # slices of one key head are matrices as they lie in memory
        mine = slice(head * rep, (head + 1) * rep)
        q = query[:, mine]
        scores = torch.bmm(q, own_k[:, :, head].transpose(1, 2))
        if border:
            theirs = torch.bmm(by_group(q), shared_k[:, :, head].transpose(1, 2))
            scores = torch.cat([by_row(theirs), scores], dim=-1)
        weight = scores.float().add_(at.bias).softmax(-1).to(query.dtype)
        result = torch.bmm(weight[..., border:], own_v[:, :, head])
        if border:
            result += by_row(torch.bmm(by_group(weight[..., :border]), shared_v[:, :, head]))
        out[:, mine] = result
    return out
