"""Which tokens of `linear_grpo_loss` are nearly certain, and of which columns of the vocabulary (sparse_gradient.py).

A token's likely columns are its target and those of probability >= 2^-17. If they are at most 256, and at most `tau` of
probability is outside, the token is sparse. One without a gradient is not.

Shapes: N scored tokens, n tokens of a chunk, B = ceil(n / 128) blocks, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .chunked_logits import row_config, row_lanes
from .online_softmax import LOG2_E

THRESHOLD = 2.0**-17
"""Least probability of a likely column."""
MOST_COLUMNS = 256
"""Of a sparse token."""
BLOCK_ROWS = 128
"""Successive tokens of a chunk whose likely columns are united."""


class LikelyColumns(NamedTuple):
    """Of a chunk's tokens."""

    dropped: torch.Tensor
    """[n] fp32: probability outside the likely columns of a sparse token; 0 of the others."""
    sparse: torch.Tensor
    """[n] bool"""
    columns: torch.Tensor
    """[B, V] bool: the likely columns of any sparse token of a block."""


def likely_columns_torch(
    e: torch.Tensor, total: torch.Tensor, target: torch.Tensor, live: torch.Tensor, tau: float, scratch: torch.Tensor
) -> LikelyColumns:
    """Find those of tokens with probabilities e [n, V] / total [n]; what e holds for their targets [n] does not matter.
    `live` [n]: whether a token has a gradient. `scratch` [n, V] is overwritten: a new one costs more than the rest."""
    least = (THRESHOLD * total)[:, None]
    unlikely = torch.lt(e, least, out=scratch)  # 0 or 1
    unlikely.scatter_(1, target[:, None], 0.0)
    count = unlikely.shape[1] - unlikely.sum(1)
    outside = unlikely.mul_(e).sum(1) / total
    sparse = live & (outside <= tau) & (count <= MOST_COLUMNS)
    columns = e.new_zeros(triton.cdiv(len(e), BLOCK_ROWS), e.shape[1], dtype=torch.bool)
    blocks = (x.split(BLOCK_ROWS) for x in (e, least, target, sparse))
    for kept, rows, limit, targets, chosen in zip(columns, *blocks, strict=True):
        torch.any((rows >= limit)[chosen], 0, out=kept)
        kept[targets[chosen]] = True
    return LikelyColumns(torch.where(sparse, outside, 0.0), sparse, columns)


@triton.jit
def probability(x, top, log_total, inv_total, scale, RAW: tl.constexpr):
    """Of raw logits (RAW), or of 2^(z - offset) where the target holds a negative number: 0."""
    x = x.to(tl.float32)
    return tl.exp2((x - top) * scale - log_total) if RAW else tl.maximum(x * inv_total, 0.0)


@triton.jit(do_not_specialize=["first"], do_not_specialize_on_alignment=["target_ptr"])
def likely_columns_kernel(
    rows_ptr,  # [n, V]: this chunk, raw logits or 2^(z - offset)
    target_ptr,
    gradient_ptr,
    top_ptr,
    total_ptr,  # [N]
    dropped_ptr,
    sparse_ptr,  # [n], filled with 0
    columns_ptr,  # [B, V], filled with 0
    first,
    V,
    stride_rows,
    inv_temperature,
    tau,
    RAW: tl.constexpr,
    THRESHOLD: tl.constexpr,
    MOST_COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per token. Those of a block write the same 1 to the same place, in whatever order."""
    row = tl.program_id(0)
    token = first + row
    target = tl.load(target_ptr + token)
    # whatever the id, no read outside the row
    if (tl.load(gradient_ptr + token) != 0) & (target >= 0) & (target < V):
        row_ptr = rows_ptr + row.to(tl.int64) * stride_rows
        top, total = tl.load(top_ptr + token), tl.load(total_ptr + token)
        scale, log_total, inv_total = inv_temperature * LOG2_E, tl.log2(total), 1.0 / total
        lane = row_lanes(BLOCK)
        count = tl.zeros_like(tl.sum(lane, 1))
        outside = tl.zeros_like(count).to(tl.float32)
        for column in tl.range(0, V, BLOCK, num_stages=3):
            x = tl.load(row_ptr + column + lane, mask=column + lane < V, other=-1e30 if RAW else 0.0)
            p = probability(x, top, log_total, inv_total, scale, RAW)
            count += tl.sum((p >= THRESHOLD).to(tl.int32), 1)
            outside += tl.sum(tl.where(p >= THRESHOLD, 0.0, p), 1)
        p_target = probability(tl.load(row_ptr + target), top, log_total, inv_total, scale, RAW)
        rare = p_target < THRESHOLD  # and kept all the same
        columns = tl.sum(count, 0) + rare.to(tl.int32)
        dropped = tl.maximum(tl.sum(outside, 0) - tl.where(rare, p_target, 0.0), 0.0)
        if (dropped <= tau) & (columns <= MOST_COLUMNS):
            tl.store(dropped_ptr + row, dropped)
            tl.store(sparse_ptr + row, rare | True)
            block_ptr = columns_ptr + (row // BLOCK_ROWS).to(tl.int64) * V
            tl.store(block_ptr + target, rare | True)
            for column in tl.range(0, V, BLOCK, num_stages=3):
                x = tl.load(row_ptr + column + lane, mask=column + lane < V, other=-1e30 if RAW else 0.0)
                likely = probability(x, top, log_total, inv_total, scale, RAW) >= THRESHOLD
                tl.store(block_ptr + column + lane, likely, mask=likely)


def likely_columns_triton(
    rows: torch.Tensor,
    first: int,
    target: torch.Tensor,
    gradient: torch.Tensor,
    top: torch.Tensor,
    total: torch.Tensor,
    inv_temperature: float,
    tau: float,
    raw: bool,
) -> LikelyColumns:
    """Find those of the tokens from `first` on, given their rows [n, V] of raw logits (`raw`) or of 2^(z - offset). The
    other tensors are [N]."""
    n, V = rows.shape
    found = LikelyColumns(
        rows.new_zeros(n, dtype=torch.float32),
        rows.new_zeros(n, dtype=torch.bool),
        rows.new_zeros(triton.cdiv(n, BLOCK_ROWS), V, dtype=torch.bool),
    )
    likely_columns_kernel[(n,)](
        rows,
        target,
        gradient,
        top,
        total,
        *found,
        first,
        V,
        rows.stride(0),
        inv_temperature,
        tau,
        raw,
        THRESHOLD,
        MOST_COLUMNS,
        BLOCK_ROWS,
        **row_config(rows),
    )
    return found
