"""A bounded approximation of the gradient of `linear_grpo_loss`: nearly certain tokens (likely_columns.py) go through
matmuls 2 and 3 with a few columns of the vocabulary.

Each block of 128 successive tokens of a chunk multiplies its sparse ones over the union U of their likely columns:
    d_hidden = dz[:, U] W[U] / T;   d_weight[U] += dz[:, U]^T hidden / T
The other tokens are dense: their rows move to the front of the chunk, in place, and go through matmuls over all
columns. A token without a gradient goes through neither.

The bound: |error of d_hidden_t| <= |g_t| dropped_t max |W_v| / T. What is left out of dz_t is -g_t p_v for columns v
outside its likely ones, and their p_v sum to dropped_t. Rounding comes on top.
FLOPs of matmuls 2 and 3: the share of dense tokens, and of sparse ones that of the columns kept. Cost: one more read of
the logits, two for sparse tokens; without log-probs at hand one more read and write; and the host waits for the GPU
once a chunk, to learn how many rows and columns there are. Measured on a GPU, or of a real model's tokens: not yet.

Shapes: N scored tokens, n tokens of a chunk, V vocabulary, D hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .gradient_matmuls import GradientMatmuls
from .likely_columns import BLOCK_ROWS, LikelyColumns
from .loss_chunks import DLogits


class SparseTokens(NamedTuple):
    """How the gradient of each token was computed, all [N]."""

    dropped: torch.Tensor
    """fp32: probability outside the likely columns of a sparse token; 0 of the others."""
    dense: torch.Tensor
    """bool: whether the token went through the dense matmuls."""
    kept: torch.Tensor
    """fp32: share of the vocabulary that the block of a sparse token kept; 0 of the others."""

    @classmethod
    def none(cls, like: torch.Tensor) -> SparseTokens:
        """Of as many tokens as `like` [N, ...] has, none of which has a gradient yet."""
        N = len(like)
        dropped, kept = (like.new_zeros(N, dtype=torch.float32) for _ in range(2))
        return cls(dropped, like.new_zeros(N, dtype=torch.bool), kept)

    def summary(self, scored: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return these fields of `GRPOLossOutput`. `scored`: [N] bool."""
        sparse, total = ((x != 0).sum().clamp(min=1) for x in (self.kept, scored))
        return {"dropped": self.dropped, "dense_rows": self.dense.sum() / total, "kept": self.kept.sum() / sparse}


def add_chunk(
    matmuls: GradientMatmuls,
    tokens: SparseTokens,
    first: int,
    chunk: DLogits,
    live: torch.Tensor,
    likely: LikelyColumns,
) -> None:
    """Add the gradients of the n tokens from `first` on, and write into `tokens` how. `live` [n]: whether a token has
    one. Overwrites `chunk.d`."""
    for rows, columns in _blocks(likely):
        matmuls.add_columns(first + rows, columns, _part(chunk, rows, chunk.d[rows[:, None], columns]))
    dense = live & ~likely.sparse
    order = _to_front(chunk.d, dense)
    if len(order):
        matmuls.add(first + order, _part(chunk, order, chunk.d[: len(order)]))
    share = likely.columns.float().mean(1).repeat_interleave(BLOCK_ROWS)[: len(dense)]
    for whole, part in zip(tokens, (likely.dropped, dense, torch.where(likely.sparse, share, 0.0)), strict=True):
        whole[first : first + len(dense)] = part


def _part(chunk: DLogits, rows: torch.Tensor, d: torch.Tensor) -> DLogits:
    return DLogits(d, None if chunk.factor is None else chunk.factor[rows])


def _blocks(likely: LikelyColumns) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return sparse rows and likely columns of each block that has any. Here the host waits for the GPU."""
    rows = [int(block.sum()) for block in likely.sparse.cpu().split(BLOCK_ROWS)]
    columns = likely.columns.sum(1).tolist()
    pairs = zip(likely.sparse.nonzero()[:, 0].split(rows), likely.columns.nonzero()[:, 1].split(columns), strict=True)
    return [(rows, columns) for rows, columns in pairs if len(rows)]


def _to_front(d: torch.Tensor, stay: torch.Tensor) -> torch.Tensor:
    """Move the rows of d [n, V] that `stay` [n] to the front, in place; return where each came from."""
    rows = stay.nonzero()[:, 0]
    order = torch.arange(len(rows), device=d.device)
    holes = (~stay[: len(rows)]).nonzero()[:, 0]
    order[holes] = rows[len(rows) - len(holes) :]  # behind the front lie as many of them as it has holes
    d[holes] = d[order[holes]]
    return order
