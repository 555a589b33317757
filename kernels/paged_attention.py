"""Attention of one new token per row over keys and values in pages, the first of which are shared by its group.

    out_r = softmax(q_r k_r^T scale) v_r        k_r, v_r: the first `lengths[r]` tokens of the row's pages

Rows of a group are neighbours and begin with the same `shared[r]` pages (their prompt's). Those are read once for the
whole group: G rows of H / K query heads per key head are one matmul against the prompt.

On CUDA there are three launches, split over the context so that few rows fill the GPU: shared pages by group, own pages
by row, and the sum of all parts. Grids and splits depend on R only and every length is read on the device, so that the
op can be captured in a graph; nothing is summed by atomics.

Bytes: 2 K d for every token of every shared prefix once and of every row's own pages once.
Tolerance: fp32 within 1e-5 of float64; bf16 error not above plain PyTorch bf16's.
Measured on a GPU: not yet.

Shapes: R rows, H query heads, K key heads, d head size, B pages in the pool, n pages in a row's table.
"""

import torch
import triton
import triton.language as tl

from . import checks
from .checks import FLOATS, REFERENCE_FLOATS, check_tensor, choose_impl, interpreted, op_scope, require
from .page_table import GatherPlan, Pages, PrefixCache

MAX_QUERIES = 64  # queries (rows x heads) of a group in one program; wgmma's minimum
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
    row_in_group_ptr,
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
    """One program: a key head, a part of the context, and the queries of one row, or (SHARED) of a block of up to ROWS
    rows of a group, of which this row must be the first. Writes an unnormalised part of the softmax."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    if SHARED and tl.load(row_in_group_ptr + row) % ROWS != 0:
        return
    lane = tl.arange(0, BLOCK_M)
    rows = row + lane // REP
    valid = (lane < ROWS * REP) & (rows < R)
    shared = tl.load(shared_ptr + row) * PAGE
    if SHARED:
        valid &= tl.load(group_ptr + rows, mask=valid, other=-1) == tl.load(group_ptr + row)
        begin, end = 0, shared
    else:
        begin, end = shared, tl.load(lengths_ptr + row)
    step = tl.cdiv(tl.cdiv(end - begin, SPLITS), BLOCK_N) * BLOCK_N
    begin += split * step
    end = tl.minimum(end, begin + step)

    offs_d = tl.arange(0, BLOCK_D)
    in_d = offs_d < D
    heads = rows.to(tl.int64) * (K * REP) + head * REP + lane % REP
    q = tl.load(query_ptr + heads[:, None] * D + offs_d[None, :], mask=valid[:, None] & in_d[None, :], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    peak = tl.full([BLOCK_M], -1e38, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(begin, end, BLOCK_N):
        token = first + tl.arange(0, BLOCK_N)
        in_span = token < end
        page = tl.load(table_ptr + row * n + token // PAGE, mask=in_span, other=0).to(tl.int64)
        slot = (page * PAGE + token % PAGE) * K + head
        offset = slot[:, None] * D + offs_d[None, :]
        k = tl.load(keys_ptr + offset, mask=in_span[:, None] & in_d[None, :], other=0.0)
        v = tl.load(values_ptr + offset, mask=in_span[:, None] & in_d[None, :], other=0.0)
        if UPCAST:
            k, v = k.to(tl.float32), v.to(tl.float32)
        z = tl.dot(q, k.T, input_precision=PRECISION) * (scale * LOG2_E)
        z = tl.where(in_span[None, :], z, -1e38)
        top = tl.maximum(peak, tl.max(z, 1))
        e = tl.where(in_span[None, :], tl.exp2(z - top[:, None]), 0.0)
        shrink = tl.exp2(peak - top)
        total = total * shrink + tl.sum(e, 1)
        acc = acc * shrink[:, None] + tl.dot(e.to(v.dtype), v, input_precision=PRECISION)
        peak = top
    part = heads * PARTS + FIRST + split
    tl.store(peak_ptr + part, peak, mask=valid)
    tl.store(total_ptr + part, total, mask=valid)
    tl.store(sum_ptr + part[:, None] * D + offs_d[None, :], acc, mask=valid[:, None] & in_d[None, :])


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
    """One program per row and head: sum the parts of its softmax on a common scale, and divide by their total."""
    offset = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK_P)
    offs_d = tl.arange(0, BLOCK_D)
    in_parts, in_d = part < PARTS, offs_d < D
    peak = tl.load(peak_ptr + offset * PARTS + part, mask=in_parts, other=-1e38)
    total = tl.load(total_ptr + offset * PARTS + part, mask=in_parts, other=0.0)
    x = tl.load(
        sum_ptr + (offset * PARTS + part)[:, None] * D + offs_d[None, :],
        mask=in_parts[:, None] & in_d[None, :],
        other=0.0,
    )
    weight = tl.exp2(peak - tl.max(peak, 0))
    out = tl.sum(x * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out_ptr + offset * D + offs_d, out, mask=in_d)


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
    """Attention of one query token per row over its pages. No gradient.

    Args:
        query: [R, H, d].
        keys: [B, page_size, K, d].
        values: [B, page_size, K, d].
        pages: which of them each row attends to.
        scale: of the scores; None means 1 / sqrt(d).
        impl: auto | triton | torch | reference.

    Returns:
        [R, H, d] in query's dtype.
    """
    impl = choose_impl(impl, query, "query")
    if not checks.checks_skipped():
        _check(query, keys, values, pages, impl)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if len(query) == 0:
        return query.clone()
    if impl == "reference":
        from . import reference

        return reference.paged_attention(query, keys, values, pages, scale=scale)
    if impl == "triton":
        return _paged_triton(query.contiguous(), keys.contiguous(), values.contiguous(), pages, scale)
    return _paged_torch(query, keys, values, pages.gather_plan, pages.prefix_cache, scale)


def _check(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, pages: Pages, impl: str) -> None:
    dtypes = REFERENCE_FLOATS if impl == "reference" else FLOATS
    check_tensor("query", query, (len(pages.lengths), None, None), dtypes, query)
    _, H, d = query.shape
    check_tensor("keys", keys, (None, pages.page_size, None, d), (query.dtype,), query)
    check_tensor("values", values, tuple(keys.shape), (query.dtype,), query)
    require(H % keys.shape[2] == 0, "keys", f"{keys.shape[2]} key heads do not divide {H} query heads")


def _paged_triton(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, pages: Pages, scale: float
) -> torch.Tensor:
    (R, H, D), K = query.shape, keys.shape[2]
    rep = H // K
    is_fp32 = query.dtype == torch.float32
    max_queries = 16 if is_fp32 else MAX_QUERIES if checks.capability(query) >= 90 else MAX_QUERIES // 2
    rows = max(1, max_queries // rep)  # more would not fit in the registers
    splits = max(1, min(8, PROGRAMS // (R * K)))
    parts = 2 * splits
    peak, total = query.new_empty(2, R, H, parts, dtype=torch.float32)
    sums, out = query.new_empty(R, H, parts, D, dtype=torch.float32), torch.empty_like(query)
    constants = {
        "SPLITS": splits,
        "PARTS": parts,
        "PAGE": pages.page_size,
        "K": K,
        "REP": rep,
        "D": D,
        "BLOCK_N": 32 if is_fp32 else BLOCK_TOKENS,
        "BLOCK_D": max(16, triton.next_power_of_2(D)),
        "PRECISION": "ieee" if is_fp32 else "tf32",
        "UPCAST": interpreted() and not is_fp32,
    }
    block_table = pages.block_table.contiguous()
    for is_shared, block_rows in ((True, rows), (False, 1)):
        paged_attention_kernel[(R, K, splits)](
            query,
            keys,
            values,
            block_table,
            pages.lengths,
            pages.group,
            pages.row_in_group,
            pages.shared,
            peak,
            total,
            sums,
            R,
            block_table.shape[1],
            scale,
            SHARED=is_shared,
            ROWS=block_rows,
            FIRST=0 if is_shared else splits,
            BLOCK_M=max(16, triton.next_power_of_2(block_rows * rep)),
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


def _own_tokens(pool: torch.Tensor, plan: GatherPlan) -> torch.Tensor:
    """Return [R, own tokens, K, d]; a view of the pool if rows lie at equal distances."""
    _, page_size, K, d = pool.shape
    tokens = plan.own_pages * page_size
    if not plan.own_stride:
        return pool.index_select(0, plan.own).view(-1, tokens, K, d)
    R, elements = len(plan.own) // plan.own_pages, page_size * K * d
    stride = (plan.own_stride * elements, K * d, d, 1)
    return pool.as_strided((R, tokens, K, d), stride, pool.storage_offset() + plan.first_own * elements)


def _shared_tokens(
    keys: torch.Tensor, values: torch.Tensor, plan: GatherPlan, prefix_cache: PrefixCache | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values [num_groups, shared tokens, K, d], from `prefix_cache` if they are in there."""
    if prefix_cache is not None and keys.data_ptr() in prefix_cache:
        return prefix_cache[keys.data_ptr()]
    shared_k, shared_v = (
        x.index_select(0, plan.shared).view(plan.num_groups, -1, *x.shape[2:]) for x in (keys, values)
    )
    if prefix_cache is not None:
        prefix_cache[keys.data_ptr()] = shared_k, shared_v
    return shared_k, shared_v


def _paged_torch(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    plan: GatherPlan,
    prefix_cache: PrefixCache | None,
    scale: float,
) -> torch.Tensor:
    """Scores against the shared and the own pages side by side under one softmax."""
    H, K = query.shape[1], keys.shape[2]
    rep, shared_len = H // K, plan.shared_pages * keys.shape[1]
    padded_rows = plan.num_groups * plan.rows_per_group
    own_k, own_v = _own_tokens(keys, plan), _own_tokens(values, plan)
    if shared_len:
        shared_k, shared_v = _shared_tokens(keys, values, plan, prefix_cache)

    def by_group(x: torch.Tensor) -> torch.Tensor:
        """[R, rep, ...] -> [num_groups, rows_per_group * rep, ...]"""
        if not plan.equal_groups:
            x = x.new_zeros(padded_rows, *x.shape[1:]).index_copy_(0, plan.padded_row, x)
        return x.reshape(plan.num_groups, plan.rows_per_group * rep, -1)

    def by_row(x: torch.Tensor) -> torch.Tensor:
        """The inverse of `by_group`."""
        x = x.view(padded_rows, rep, -1)
        return x if plan.equal_groups else x.index_select(0, plan.padded_row)

    query, out = query * scale, torch.empty_like(query)
    for head in range(K):  # slices of one key head are matrices as they lie in memory
        heads = slice(head * rep, (head + 1) * rep)
        q = query[:, heads]
        scores = torch.bmm(q, own_k[:, :, head].transpose(1, 2))
        if shared_len:
            shared_scores = torch.bmm(by_group(q), shared_k[:, :, head].transpose(1, 2))
            scores = torch.cat([by_row(shared_scores), scores], dim=-1)
        weight = scores.float().add_(plan.bias).softmax(-1).to(query.dtype)
        result = torch.bmm(weight[..., shared_len:], own_v[:, :, head])
        if shared_len:
            result += by_row(torch.bmm(by_group(weight[..., :shared_len]), shared_v[:, :, head]))
        out[:, heads] = result
    return out
