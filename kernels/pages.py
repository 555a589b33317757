"""Where the rows of a decode step find their keys and values: pages of a cache, shared by the rows of a group."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from . import checks
from .checks import check_tensor, check_values, require

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
    memory: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None
    """The PyTorch path keeps gathered shared pages here, by pool. Pass the same dict while the rows stay the same."""

    def __post_init__(self) -> None:
        if checks.trusting():
            return
        table, lengths = self.block_table, self.lengths
        check_tensor("block_table", table, (None, None), INTEGERS, table)
        for name in ("lengths", "group", "shared"):
            check_tensor(name, getattr(self, name), (table.shape[0],), INTEGERS, table)
        require(self.page >= 1, "page", f"at least 1 token, got {self.page}")
        if not len(lengths) or not check_values(lengths):
            return
        low, high, most = int(lengths.min()), int(lengths.max()), table.shape[1] * self.page
        require(low >= 1 and high <= most, "lengths", f"must be in [1, {most}], got {low} .. {high}")
        ordered = bool((self.group[1:] >= self.group[:-1]).all())
        require(ordered, "group", "must be non-decreasing")
        inside = bool((self.shared * self.page <= lengths).all()) and int(self.shared.min()) >= 0
        require(inside, "shared", "more pages than the row's length fills")

    @functools.cached_property
    def place(self) -> torch.Tensor:
        """[R] int32, the row's number within its group."""
        start = torch.searchsorted(self.group, self.group)
        return (torch.arange(len(start), device=start.device) - start).to(torch.int32)

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
        own = table.gather(1, place.clamp_(max=table.shape[1] - 1))
        self.own, self.first_own = own.flatten(), int(own[0, 0])
        self.apart = int(own[1, 0]) - self.first_own if R > 1 else self.m
        """Pages from one row's own ones to the next row's, where all rows lie so; else 0."""
        regular = self.first_own + self.apart * torch.arange(R, device=device)[:, None]
        if self.apart < self.m or not torch.equal(own, regular + torch.arange(self.m, device=device)):
            self.apart = 0
        self.shared = table[first, : self.n].flatten()
        self.regular = self.G * self.most == R
        """All groups have equally many rows."""
        number = torch.repeat_interleave(torch.arange(self.G, device=device), counts)
        self.slot = number * self.most + torch.arange(R, device=device) - first[number]
        """[R] places of the rows where every group has `most` of them."""
        token = torch.arange(self.n * page, device=device)
        hidden = [(token >= (group_shared * page)[:, None])[number]]
        hidden.append(torch.arange(self.m * page, device=device) >= own_lengths[:, None])
        hidden = torch.cat(hidden, dim=1)[:, None]
        self.bias = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, -torch.inf)
        """[R, 1, shared tokens + own tokens]: 0 for what a row sees, else -inf. Adding it is cheaper than masking."""
