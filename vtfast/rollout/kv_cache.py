"""Keys and values of all rows in a fixed pool of pages. The pages of a prompt are shared by its G rows.

A group's worst case is reserved when it is admitted, so nothing is ever evicted or run twice: the full pages of the
prompt once, and for each row the pages of the prompt's rest and of its own tokens. Pages never move.

Shared pages come from one end of the pool and own pages, equally many for each row, from the other. Rows that are
admitted together thus lie at equal distances, and PyTorch's attention reads them as one strided tensor without a copy.
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
    """Pages of each row: first the prompt's last, partial page (its own copy), then its tokens'."""

    @property
    def all(self) -> list[int]:
        return self.shared + [page for pages in self.own for page in pages]


class PagedCache:
    """`keys` and `values` [layers, pages + 1, page size, K, d]. K key heads, d head size.

    Page 0 is scratch: padding rows write there, and unused entries of block tables point to it.
    """

    def __init__(
        self,
        layers: int,
        pages: int,
        page_size: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.page_size = page_size
        shape = (layers, pages + 1, page_size, heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.pages = pages
        self.reset()

    def reset(self) -> None:
        """Free all pages, in order."""
        self.free = deque(range(1, self.pages + 1))

    def clear(self) -> None:
        """Overwrite all keys and values with zeros."""
        self.keys.zero_()
        self.values.zero_()

    def allocate(self, prompt_tokens: int, rows: int, new_tokens: int) -> GroupPages | None:
        """Return pages for a group, or None while too few are free.

        Raises UserError if even an empty pool is too small.
        """
        shared, own = pages_needed(self.page_size, prompt_tokens, new_tokens)
        total = shared + rows * own
        if total > self.pages:
            raise UserError(
                f"a prompt of {prompt_tokens} tokens with {rows} completions of {new_tokens} needs {total} cache pages"
                f" of {self.page_size} tokens; the cache has {self.pages}"
            )
        if total > len(self.free):
            return None
        prefix = [self.free.pop() for _ in range(shared)][::-1]
        return GroupPages(prefix, [[self.free.popleft() for _ in range(own)] for _ in range(rows)])

    def release(self, pages: list[int]) -> None:
        self.free.extend(pages)
        if len(self.free) == self.pages:
            self.reset()

    def prompt_slots(self, group: GroupPages, prompt_tokens: int) -> tuple[Tensor, Tensor]:
        """Return (token of the prompt, slot in the pool) of everything that prefill writes: [M], [M]."""
        shared = len(group.shared) * self.page_size
        tokens = [torch.arange(shared)]
        slots = [_slots(group.shared, self.page_size)]
        for pages in group.own:
            tokens.append(torch.arange(shared, prompt_tokens))
            slots.append(_slots(pages, self.page_size)[: prompt_tokens - shared])
        return torch.cat(tokens), torch.cat(slots)


def pages_needed(page_size: int, prompt_tokens: int, new_tokens: int) -> tuple[int, int]:
    """Return (shared pages, own pages of each row) for a prompt and at most `new_tokens` more per row."""
    return prompt_tokens // page_size, -(-(page_size - 1 + new_tokens) // page_size)


def _slots(pages: list[int], page_size: int) -> Tensor:
    return (torch.tensor(pages, dtype=torch.int64)[:, None] * page_size + torch.arange(page_size)).flatten()
