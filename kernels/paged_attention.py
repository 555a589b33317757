"""Attention of one new token per row over keys and values in pages, the first of which are shared by its group.

    out_r = softmax(q_r k_r^T scale) v_r        k_r, v_r: the first `lengths[r]` tokens of the row's pages

Rows of a group are neighbours and begin with the same `shared[r]` pages (their prompt's). Those are read once for up to
32 queries of the group, which are one matmul per key head; what more queries read, they find in L2.

On CUDA this is one launch. Its programs split the context, a prompt among the rows of its group, so that few rows fill
the GPU. Each writes a part of a softmax and counts itself; the one that is last adds up the query's parts. It does so
in the order of their numbers, and atomics count integers only: twice the same bits. The grid depends on R only and
every length is read on the device, so that the op can be captured in a graph.

Bytes in half precision: 4 K d for every token of every shared prefix once and of every row's own pages once, and
8 H d for every row and part, written to L2 and read again.
In half precision four programs fit on a Hopper multiprocessor.
Tolerance: fp32 within 1e-5 of float64; bf16 error not above plain PyTorch bf16's.
Measured on a GPU: not yet.

Shapes: R rows, H query heads, K key heads, d head size, B pages in the pool, n pages in a row's table.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import checks
from .checks import FLOATS, REFERENCE_FLOATS, check_tensor, choose_impl, interpreted, op_scope, require
from .gathered_attention import attend_gathered
from .online_softmax import LOG2_E, LOWEST
from .page_table import Pages

MAX_QUERIES = 32  # queries (rows x heads) of a group in one program; more leave fewer programs on a multiprocessor
BLOCK_TOKENS = 32  # in one turn of a program's loop, while the next two are loaded
MIN_BLOCK_TOKENS = 16  # the smallest matmul
MAX_SPLITS = 8
PROGRAMS = 528  # enough to fill 132 multiprocessors four times
HALF_REGISTERS = 128  # per thread in half precision: those of four programs on a multiprocessor


class Settings(NamedTuple):
    """What the kernel is compiled for."""

    rows: int
    """Of a group in one program, at most."""
    splits: int
    """Programs of a row and key head that attend to own tokens, and as many that attend to shared ones."""
    shared_parts: int
    """Parts into which a prompt is split, at most."""
    parts: int
    """Of a softmax, at most."""
    page: int
    """Tokens per page."""
    block: int
    """Tokens in one turn of a program's loop; divides `page`."""
    key_heads: int
    rep: int
    """Query heads per key head."""
    d: int
    upcast: bool


@triton.jit
def attend_tokens(q, keys_ptr, values_ptr, table_ptr, begin, end, scale, S: tl.constexpr):
    """Return peak = max z and total = sum 2^(z - peak) [M], and sum 2^(z - peak) v [M, D], over the tokens
    begin .. end of the row whose pages `table_ptr` lists, where z = log2(e) scale q k."""
    lane = tl.arange(0, S.block)
    offs_d = tl.arange(0, q.shape[1])
    tile = lane[:, None] * (S.key_heads * S.d) + offs_d[None, :]
    peak = tl.full([q.shape[0]], LOWEST, tl.float32)
    total = tl.zeros([q.shape[0]], tl.float32)
    acc = tl.zeros(q.shape, tl.float32)
    # A block lies in one page, whose number is loaded a turn ahead: the loads of keys would otherwise wait for it, and
    # the compiler would keep half as many of them on their way.
    page = tl.load(table_ptr + begin // S.page, mask=begin < end, other=0)
    for first in range(begin, end, S.block):
        corner = ((page.to(tl.int64) * S.page + first % S.page) * S.key_heads + tl.program_id(1)) * S.d
        following = first + S.block
        page = tl.load(table_ptr + following // S.page, mask=following < end, other=0)
        in_span = lane < end - first
        mask = in_span[:, None] & (offs_d < S.d)[None, :]
        k = tl.load(keys_ptr + corner + tile, mask=mask, other=0.0)
        v = tl.load(values_ptr + corner + tile, mask=mask, other=0.0)
        if S.upcast:
            k, v = k.to(tl.float32), v.to(tl.float32)
        z = tl.dot(q, k.T, input_precision="ieee") * (scale * LOG2_E)
        z = tl.where(in_span[None, :], z, LOWEST)
        top = tl.maximum(peak, tl.max(z, 1))
        e = tl.exp2(z - top[:, None])
        shrink = tl.exp2(peak - top)
        total = total * shrink + tl.sum(e, 1)
        acc = acc * shrink[:, None] + tl.dot(e.to(v.dtype), v, input_precision="ieee")
        peak = top
    return peak, total, acc


@triton.jit
def combine_parts(peak_ptr, total_ptr, sum_ptr, out_ptr, query, mask, parts, S: tl.constexpr):
    """Write the attention of these queries: their parts on a common scale, added in order, over their total."""
    offs_d = tl.arange(0, triton.next_power_of_2(S.d))
    in_d = mask[:, None] & (offs_d < S.d)[None, :]
    lane = tl.arange(0, triton.next_power_of_2(S.parts))
    in_parts = mask[:, None] & (lane < parts)[None, :]
    top = tl.max(tl.load(peak_ptr + query[:, None] * S.parts + lane[None, :], mask=in_parts, other=LOWEST), 1)
    total = tl.zeros(query.shape, tl.float32)
    acc = tl.zeros([query.shape[0], offs_d.shape[0]], tl.float32)
    for part in tl.range(0, parts, num_stages=3):
        at = query * S.parts + part
        weight = tl.exp2(tl.load(peak_ptr + at, mask=mask, other=LOWEST) - top)
        x = tl.load(sum_ptr + at[:, None] * S.d + offs_d[None, :], mask=in_d, other=0.0)
        total = tl.fma(tl.load(total_ptr + at, mask=mask, other=1.0), weight, total)
        acc = tl.fma(x, weight[:, None], acc)
    tl.store(out_ptr + query[:, None] * S.d + offs_d[None, :], acc / total[:, None], mask=in_d)


@triton.jit
def query_numbers(row, rows, BLOCK: tl.constexpr, S: tl.constexpr):
    """Return the numbers [BLOCK] of the program's queries among all R H, and which are valid: those of `rows` rows."""
    lane = tl.arange(0, BLOCK)
    in_row = tl.program_id(1) * S.rep + lane % S.rep
    return (row + lane // S.rep) * (S.key_heads * S.rep) + in_row, lane < rows * S.rep


@triton.jit
def attend_part(pointers, table_ptr, row, rows, begin, end, part, parts, scale, QUERIES: tl.constexpr, S: tl.constexpr):
    """Attend from `rows` rows, QUERIES queries at most, to the tokens begin .. end. Write that part of their softmax,
    and the attention of those queries of which it is the last part to arrive; their counters are then 0 again."""
    query_ptr, keys_ptr, values_ptr, arrivals_ptr, peak_ptr, total_ptr, sum_ptr, out_ptr = pointers
    query, valid = query_numbers(row, rows, max(16, QUERIES), S)
    offs_d = tl.arange(0, max(16, triton.next_power_of_2(S.d)))
    mask = valid[:, None] & (offs_d < S.d)[None, :]
    q = tl.load(query_ptr + query[:, None] * S.d + offs_d[None, :], mask=mask, other=0.0)
    if S.upcast:
        q = q.to(tl.float32)
    peak, total, acc = attend_tokens(q, keys_ptr, values_ptr, table_ptr, begin, end, scale, S)
    at = query * S.parts + part
    tl.store(peak_ptr + at, peak, mask=valid)
    tl.store(total_ptr + at, total, mask=valid)
    tl.store(sum_ptr + at[:, None] * S.d + offs_d[None, :], acc, mask=mask)

    tl.debug_barrier()  # every thread has stored before one counts the arrival
    query, valid = query_numbers(row, rows, QUERIES, S)
    arrived = tl.atomic_add(arrivals_ptr + query, 1, mask=valid, sem="acq_rel")
    is_last = valid & (arrived == parts - 1)
    if tl.max(is_last.to(tl.int32), 0) == 1:
        tl.debug_barrier()  # no thread loads before all have counted
        combine_parts(peak_ptr, total_ptr, sum_ptr, out_ptr, query, is_last, parts, S)
        tl.store(arrivals_ptr + query, 0, mask=is_last)


@triton.jit(do_not_specialize=["n"])
def paged_attention_kernel(
    query_ptr,
    keys_ptr,
    values_ptr,
    table_ptr,
    lengths_ptr,
    row_in_group_ptr,
    group_size_ptr,
    shared_ptr,
    arrivals_ptr,  # [R, H]
    peak_ptr,
    total_ptr,
    sum_ptr,  # [R, H, parts], [R, H, parts], [R, H, parts, d]
    out_ptr,
    n,
    scale,
    S: tl.constexpr,
):
    """One program per row, key head and split. The first splits of the rows of a block (up to S.rows rows of a group)
    divide their shared tokens among them and attend to these from the whole block. The other splits of a row divide its
    own tokens, and attend from this row."""
    row = tl.program_id(0)
    split = tl.program_id(2)
    in_block = tl.load(row_in_group_ptr + row) % S.rows
    first = row - in_block
    rows = tl.minimum(S.rows, tl.load(group_size_ptr + row) - tl.load(row_in_group_ptr + first))
    shared_parts = tl.minimum(rows * S.splits, S.shared_parts)
    parts = shared_parts + S.splits
    shared = tl.load(shared_ptr + row).to(tl.int32) * S.page
    pointers = (query_ptr, keys_ptr, values_ptr, arrivals_ptr, peak_ptr, total_ptr, sum_ptr, out_ptr)
    table_ptr += row * n
    if split < S.splits:
        part = in_block * S.splits + split
        step = tl.cdiv(tl.cdiv(shared, shared_parts), S.block) * S.block
        begin = part * step
        end = tl.minimum(shared, begin + step)
        QUERIES: tl.constexpr = triton.next_power_of_2(S.rows * S.rep)
        if part < shared_parts:  # the others are not counted
            attend_part(pointers, table_ptr, first, rows, begin, end, part, parts, scale, QUERIES, S)
    else:
        length = tl.load(lengths_ptr + row).to(tl.int32)
        step = tl.cdiv(tl.cdiv(length - shared, S.splits), S.block) * S.block
        begin = shared + (split - S.splits) * step
        end = tl.minimum(length, begin + step)
        part = shared_parts + split - S.splits
        OWN: tl.constexpr = triton.next_power_of_2(S.rep)
        attend_part(pointers, table_ptr, row, 1, begin, end, part, parts, scale, OWN, S)


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
        pages: which of them each row attends to. For Triton of a multiple of 16 tokens.
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
    return attend_gathered(query, keys, values, pages, scale)


def _check(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, pages: Pages, impl: str) -> None:
    dtypes = REFERENCE_FLOATS if impl == "reference" else FLOATS
    check_tensor("query", query, (len(pages.lengths), None, None), dtypes, query)
    _, H, d = query.shape
    check_tensor("keys", keys, (None, pages.page_size, None, d), (query.dtype,), query)
    check_tensor("values", values, tuple(keys.shape), (query.dtype,), query)
    require(H % keys.shape[2] == 0, "keys", f"{keys.shape[2]} key heads do not divide {H} query heads")
    fits = impl != "triton" or pages.page_size % MIN_BLOCK_TOKENS == 0
    require(fits, "page_size", f"Triton needs a multiple of {MIN_BLOCK_TOKENS} tokens, got {pages.page_size}")


def _paged_triton(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, pages: Pages, scale: float
) -> torch.Tensor:
    (R, H, d), K = query.shape, keys.shape[2]
    rep, is_fp32 = H // K, query.dtype == torch.float32
    rows = max(1, MAX_QUERIES // (2 * rep if is_fp32 else rep))
    splits = max(1, min(MAX_SPLITS, PROGRAMS // (2 * R * K)))
    shared_parts = min(rows * splits, MAX_SPLITS)
    block = math.gcd(pages.page_size, BLOCK_TOKENS)
    upcast = interpreted() and not is_fp32
    S = Settings(rows, splits, shared_parts, shared_parts + splits, pages.page_size, block, K, rep, d, upcast)
    peak, total = query.new_empty(2, R, H, S.parts, dtype=torch.float32)
    sums, out = query.new_empty(R, H, S.parts, d, dtype=torch.float32), torch.empty_like(query)
    block_table = pages.block_table.contiguous()
    paged_attention_kernel[(R, K, 2 * splits)](
        query,
        keys,
        values,
        block_table,
        pages.lengths,
        pages.row_in_group,
        pages.group_size,
        pages.shared,
        pages.arrivals(H),
        peak,
        total,
        sums,
        out,
        block_table.shape[1],
        scale,
        S,
        num_stages=3,
        maxnreg=None if is_fp32 else HALF_REGISTERS,
    )
    return out
