"""Attention of one new token a row over keys and values in pages, the first of which a row may share with its group.

    out_r = softmax(q_r k_r^T scale) v_r        k_r, v_r: the first `lengths[r]` tokens of the row's pages

Rows of a group stand next to each other and begin with the same `shared[r]` pages (their prompt's). Those are read
once for the whole group, so that a group of G rows is one matmul against its prompt and not G.

Bytes: 2 K d for every token of every shared prefix once and of every row's own pages once.
Tolerance: fp32 within 1e-5 of float64; bf16 error not above plain PyTorch bf16's.
On CUDA there is no kernel yet: "auto" takes the gathered PyTorch path there too.

Shapes: R rows, H query heads, K key heads, d head size, B pages in the pool, n pages of a row's table.
"""

import functools
from dataclasses import dataclass

import torch

from .checks import FLOATS, REFERENCE_FLOATS, check_tensor, check_values, op_scope, require

INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True)
class Pages:
    """Where the rows of a step find their keys and values. Made once a step and read by every layer."""

    block_table: torch.Tensor
    """[R, n] int, the row's pages in order; places behind its length may hold any valid page."""
    lengths: torch.Tensor
    """[R] int, tokens that the row sees, its own new one included."""
    group: torch.Tensor
    """[R] int, non-decreasing; rows of a group share their first pages."""
    shared: torch.Tensor
    """[R] int, how many; full pages, equal within a group."""
    page: int
    """Tokens of a page."""

    def __post_init__(self) -> None:
        table, lengths = self.block_table, self.lengths
        check_tensor("block_table", table, (None, None), INTEGERS, table)
        for name in ("lengths", "group", "shared"):
            check_tensor(name, getattr(self, name), (table.shape[0],), INTEGERS, table)
        require(self.page >= 1, "page", f"at least 1 token, got {self.page}")
        if not len(lengths) or not check_values(lengths):
            return
        low, high, most = int(lengths.min()), int(lengths.max()), table.shape[1] * self.page
        require(
            low >= 1 and high <= most, "lengths", f"must be in [1, {most}], got {low} .. {high}"
        )
        ordered = bool((self.group[1:] >= self.group[:-1]).all())
        require(ordered, "group", "must be non-decreasing")
        inside = bool((self.shared * self.page <= lengths).all()) and int(self.shared.min()) >= 0
        require(inside, "shared", "more pages than the row's length fills")

    @functools.cached_property
    def gathered(self) -> "Gathered":
        return Gathered(self)


class Gathered:
    """Indices and masks of the PyTorch path: shared pages once a group, own pages once a row."""

    def __init__(self, pages: Pages) -> None:
        table, page = pages.block_table.long(), pages.page
        R, device = table.shape[0], table.device
        _, counts = torch.unique_consecutive(pages.group, return_counts=True)
        first = counts.cumsum(0) - counts
        group_shared = pages.shared[first].long()
        self.G, self.most, self.n = len(counts), int(counts.max()), int(group_shared.max())
        own_start = pages.shared.long()
        own_lengths = pages.lengths.long() - own_start * page
        self.m = -(-int(own_lengths.max()) // page)
        place = own_start[:, None] + torch.arange(self.m, device=device)
        self.own = table.gather(1, place.clamp_(max=table.shape[1] - 1)).flatten()
        self.shared = table[first, : self.n].flatten()
        self.regular = self.G * self.most == R
        """All groups have equally many rows."""
        number = torch.repeat_interleave(torch.arange(self.G, device=device), counts)
        self.slot = number * self.most + torch.arange(R, device=device) - first[number]
        """[R] places of the rows where every group has `most` of them."""
        token = torch.arange(self.n * page, device=device)
        hidden = [(token >= (group_shared * page)[:, None])[number]]
        hidden.append(torch.arange(self.m * page, device=device) >= own_lengths[:, None])
        self.hidden = torch.cat(hidden, dim=1)[:, None]
        """[R, 1, shared tokens + own tokens]"""


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
        keys, values: [B, page, K, d].
        pages: which of them each row sees.
        scale: of the scores; None means 1 / sqrt(d).
        impl: auto | torch | reference.

    Returns:
        [R, H, d] in query's dtype.
    """
    known = impl in ("auto", "torch", "reference")
    require(known, "impl", f"auto, torch or reference, got {impl!r}")
    dtypes = REFERENCE_FLOATS if impl == "reference" else FLOATS
    check_tensor("query", query, (len(pages.lengths), None, None), dtypes, query)
    R, H, d = query.shape
    check_tensor("keys", keys, (None, pages.page, None, d), (query.dtype,), query)
    check_tensor("values", values, tuple(keys.shape), (query.dtype,), query)
    require(H % keys.shape[2] == 0, "keys", f"{keys.shape[2]} heads do not divide query's {H}")
    scale = d**-0.5 if scale is None else scale
    if R == 0:
        return query.clone()
    if impl == "reference":
        from . import reference

        return reference.paged_attention(query, keys, values, pages, scale=scale)
    return _gathered(query, keys, values, pages.gathered, scale)


def _gathered(query, keys, values, at: Gathered, scale: float) -> torch.Tensor:
    """Scores against the shared and the own pages side by side under one softmax."""
    (R, H, d), (_, page, K, _) = query.shape, keys.shape
    rep, G, most, border = H // K, at.G, at.most, at.n * page
    own_k, own_v = (x.index_select(0, at.own).view(R, -1, K, d) for x in (keys, values))
    if border:
        shared_k, shared_v = (
            x.index_select(0, at.shared).view(G, -1, K, d) for x in (keys, values)
        )

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
        weight = scores.float().masked_fill_(at.hidden, -torch.inf).softmax(-1).to(query.dtype)
        result = torch.bmm(weight[..., border:], own_v[:, :, head])
        if border:
            result += by_row(torch.bmm(by_group(weight[..., :border]), shared_v[:, :, head]))
        out[:, mine] = result
    return out
