"""Keys and values of all rows in a fixed pool of pages. The pages of a prompt are shared by its G rows.

A group's worst case is reserved when it is admitted, so nothing is ever evicted or run twice: full pages of the prompt
once, and for each row the pages of the prompt's rest and of its own tokens. Pages never move.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtfast.errors import UserError


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
    ) -> None:  # fmt: skip
        self.page = page
        shape = (layers, pages + 1, page, heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.free = list(range(pages, 0, -1))
        self.pages = pages

    def need(self, prompt: int, rows: int, new: int) -> tuple[int, int]:
        """(shared pages, own pages of each row) for a prompt of `prompt` tokens and `new` more a row."""
        shared, rest = divmod(prompt, self.page)
        return shared, -(-(rest + new) // self.page)

    def admit(self, prompt: int, rows: int, new: int) -> GroupPages | None:
        """Pages for a group; None while too few are free. Raises UserError if even an empty pool is too small."""
        shared, own = self.need(prompt, rows, new)
        total = shared + rows * own
        if total > self.pages:
            raise UserError(
                f"a prompt of {prompt} tokens with {rows} completions of {new} needs {total} cache pages of"
                f" {self.page} tokens; the cache has {self.pages}"
            )
        if total > len(self.free):
            return None
        taken = [self.free.pop() for _ in range(total)]
        rows_pages = [taken[shared + i * own : shared + (i + 1) * own] for i in range(rows)]
        return GroupPages(taken[:shared], rows_pages)

    def release(self, pages: list[int]) -> None:
        self.free.extend(pages)

    def prompt_slots(self, group: GroupPages, prompt: int) -> tuple[Tensor, Tensor]:
        """(token of the prompt, slot in the pool) of everything that prefill writes: [M], [M]."""
        shared = len(group.shared) * self.page
        tokens = [torch.arange(shared)]
        slots = [_slots(group.shared, self.page)]
        for pages in group.own:
            tokens.append(torch.arange(shared, prompt))
            slots.append(_slots(pages, self.page)[: prompt - shared])
        return torch.cat(tokens), torch.cat(slots)


def _slots(pages: list[int], page: int) -> Tensor:
    return (torch.tensor(pages, dtype=torch.int64)[:, None] * page + torch.arange(page)).flatten()
