"""Where the rows of a decode step find their keys and values: pages of a cache, shared by the rows of a group.

Shapes: R rows, n pages in a row's table, page_size tokens per page.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch

from . import checks
from .checks import check_tensor, check_values, require

INTEGERS = (torch.int32, torch.int64)
PrefixCache = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""Gathered keys and values [groups, shared tokens, K, d] of shared pages, by the address of the pool of keys."""


@dataclass(frozen=True)
class Pages:
    """The pages of every row of a step. Made once a step and read by every layer."""

    block_table: torch.Tensor
    """[R, n] int, the row's pages in order; entries behind its length may hold any valid page."""
    lengths: torch.Tensor
    """[R] int, tokens that the row attends to, its own new one included."""
    group: torch.Tensor
    """[R] int, non-decreasing; rows of a group share their first pages."""
    shared: torch.Tensor
    """[R] int, the number of shared pages: full ones, equal within a group."""
    page_size: int
    """Tokens per page."""
    prefix_cache: PrefixCache | None = None
    """Where the PyTorch path keeps gathered shared pages. Pass the same dict while the rows stay the same."""
    _arrivals: dict[int, torch.Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if checks.checks_skipped():
            return
        table, lengths = self.block_table, self.lengths
        check_tensor("block_table", table, (None, None), INTEGERS, table)
        for name in ("lengths", "group", "shared"):
            check_tensor(name, getattr(self, name), (table.shape[0],), INTEGERS, table)
        require(self.page_size >= 1, "page_size", f"must be at least 1 token, got {self.page_size}")
        if not len(lengths) or not check_values(lengths):
            return
        low, high, most = int(lengths.min()), int(lengths.max()), table.shape[1] * self.page_size
        require(low >= 1 and high <= most, "lengths", f"must be in [1, {most}], got {low} .. {high}")
        ordered = bool((self.group[1:] >= self.group[:-1]).all())
        require(ordered, "group", "must be non-decreasing")
        inside = bool((self.shared * self.page_size <= lengths).all()) and int(self.shared.min()) >= 0
        require(inside, "shared", "more pages than the row's length fills")

    @functools.cached_property
    def row_in_group(self) -> torch.Tensor:
        """[R] int32, the row's number within its group."""
        start = torch.searchsorted(self.group, self.group)
        return (torch.arange(len(start), device=start.device) - start).to(torch.int32)

    @functools.cached_property
    def group_size(self) -> torch.Tensor:
        """[R] int32, the number of rows in the row's group."""
        start, end = (torch.searchsorted(self.group, self.group, right=right) for right in (False, True))
        return (end - start).to(torch.int32)

    def arrivals(self, heads: int) -> torch.Tensor:
        """[R, heads] int32: Triton's kernel counts in there which parts of a softmax are done, and sets the counter
        back after the last. No two launches count in it at a time, since it belongs to these pages and a step's layers
        run one after the other. A graph that captures the step zeroes it at each replay."""
        if heads not in self._arrivals:
            self._arrivals[heads] = torch.zeros(len(self.lengths), heads, dtype=torch.int32, device=self.lengths.device)
        return self._arrivals[heads]

    @functools.cached_property
    def gather_plan(self) -> GatherPlan:
        return GatherPlan(self)


class GatherPlan:
    """Indices and masks of the PyTorch path, which gathers shared pages once per group and own pages once per row."""

    def __init__(self, pages: Pages) -> None:
        table, page_size = pages.block_table.long(), pages.page_size
        R, device = table.shape[0], table.device
        _, counts = torch.unique_consecutive(pages.group, return_counts=True)
        first_row = counts.cumsum(0) - counts
        group_shared = pages.shared[first_row].long()
        self.num_groups = len(counts)
        self.rows_per_group = int(counts.max())
        """Number of rows in the largest group."""
        self.shared_pages = int(group_shared.max())
        """Shared pages that are gathered per group: those of the group that has most."""
        self.shared = table[first_row, : self.shared_pages].flatten()
        """[num_groups * shared_pages] pages in the pool."""

        own_start = pages.shared.long()
        own_lengths = pages.lengths.long() - own_start * page_size
        self.own_pages = -(-int(own_lengths.max()) // page_size)
        """Own pages that are read per row: those of the row that has most."""
        own_page = torch.arange(self.own_pages, device=device)
        own = table.gather(1, (own_start[:, None] + own_page).clamp_(max=table.shape[1] - 1))
        self.own = own.flatten()
        """[R * own_pages] pages in the pool."""
        self.first_own = int(own[0, 0])
        self.own_stride = _row_stride(own, self.first_own)
        """Pages from one row's first own page to the next row's if all rows lie at equal distances, else 0."""

        self.equal_groups = self.num_groups * self.rows_per_group == R
        """Whether all groups have equally many rows."""
        group_number = torch.repeat_interleave(torch.arange(self.num_groups, device=device), counts)
        row = torch.arange(R, device=device)
        self.padded_row = group_number * self.rows_per_group + row - first_row[group_number]
        """[R] position of each row when every group is padded to `rows_per_group` rows."""

        token = torch.arange(self.shared_pages * page_size, device=device)
        masked_shared = (token >= (group_shared * page_size)[:, None])[group_number]
        masked_own = torch.arange(self.own_pages * page_size, device=device) >= own_lengths[:, None]
        masked = torch.cat([masked_shared, masked_own], dim=1)[:, None]
        self.bias = torch.zeros(masked.shape, device=device).masked_fill_(masked, -torch.inf)
        """[R, 1, shared tokens + own tokens]: 0 where the row attends, else -inf. Adding is cheaper than masking."""


def _row_stride(own: torch.Tensor, first: int) -> int:
    """`own` [R, pages]: return the distance between rows if every row is consecutive and all are equally far apart and
    do not overlap, else 0."""
    R, pages = own.shape
    stride = int(own[1, 0]) - first if R > 1 else pages
    row, page = torch.arange(R, device=own.device)[:, None], torch.arange(pages, device=own.device)
    return stride if stride >= pages and torch.equal(own, first + stride * row + page) else 0
