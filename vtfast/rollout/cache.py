"""Keys and values of all rows in a fixed pool of pages. The pages of a prompt are shared by its G rows.

A group's worst case is reserved when it is admitted, so nothing is ever evicted or run twice: full pages of the prompt
once, and for each row the pages of the prompt's rest and of its own tokens. Pages never move.

Shared pages come from one end of the pool and own pages, equally many for each row, from the other. Rows that are
admitted together so lie at equal distances, and PyTorch's attention reads them as one strided tensor without a copy.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from vtfast.utils.errors import UserError


@dataclass(frozen=True)
class GroupPages:
    """Pages of one prompt and its rows."""

    shared: list[int]
    """Full pages of the prompt, read by every row."""
    own: list[list[int]]
    """Of each row: first the prompt's last, partial page (its own copy), then its tokens'."""

    @property
    def all(self) -> list[int]:
        return self.shared + [page for pages in self.own for page in pages]


class PagedCache:
    """`keys` and `values` [layers, pages, page, K, d]. K key heads, d head size. Page 0 is scrap paper: rows that are
    padding write there, and unused places of block tables point to it."""

    def __init__(
        self, layers: int, pages: int, page: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.page = page
        shape = (layers, pages + 1, page, heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.pages = pages
        self.reset()

    def reset(self) -> None:
        """All pages free, in order."""
        self.free = deque(range(1, self.pages + 1))

    def clear(self) -> None:
        self.keys.zero_()
        self.values.zero_()

    def admit(self, prompt: int, rows: int, new: int) -> GroupPages | None:
        """Pages for a group; None while too few are free. Raises UserError if even an empty pool is too small."""
        shared, own = pages_needed(self.page, prompt, new)
        total = shared + rows * own
        if total > self.pages:
            raise UserError(
                f"a prompt of {prompt} tokens with {rows} completions of {new} needs {total} cache pages of"
                f" {self.page} tokens; the cache has {self.pages}"
            )
        if total > len(self.free):
            return None
        prefix = [self.free.pop() for _ in range(shared)][::-1]
        return GroupPages(prefix, [[self.free.popleft() for _ in range(own)] for _ in range(rows)])

    def release(self, pages: list[int]) -> None:
        self.free.extend(pages)
        if len(self.free) == self.pages:
            self.reset()

    def prompt_slots(self, group: GroupPages, prompt: int) -> tuple[Tensor, Tensor]:
        """(token of the prompt, slot in the pool) of everything that prefill writes: [M], [M]."""
        shared = len(group.shared) * self.page
        tokens = [torch.arange(shared)]
        slots = [_slots(group.shared, self.page)]
        for pages in group.own:
            tokens.append(torch.arange(shared, prompt))
            slots.append(_slots(pages, self.page)[: prompt - shared])
        return torch.cat(tokens), torch.cat(slots)


def pages_needed(page: int, prompt: int, new: int) -> tuple[int, int]:
    """(shared pages, own pages of each row) for a prompt of `prompt` tokens and at most `new` more a row."""
    return prompt // page, -(-(page - 1 + new) // page)


def _slots(pages: list[int], page: int) -> Tensor:
    return (torch.tensor(pages, dtype=torch.int64)[:, None] * page + torch.arange(page)).flatten()
