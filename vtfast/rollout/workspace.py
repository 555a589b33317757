"""What a rollout works on and keeps between calls: cache, rows, output, decoder, and the graphs that know them all."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtfast.model.policy import Policy
from vtfast.model.shapes import text_shape
from vtfast.rollout.attention import Attention
from vtfast.rollout.cache import PagedCache
from vtfast.rollout.decode import Decoder
from vtfast.rollout.decode_state import Output, Rows
from vtfast.rollout.graphs import Capture, Graphs


@dataclass(frozen=True)
class Size:
    """What a call needs."""

    cache_pages: int
    rows: int
    """In flight at once."""
    pages_a_row: int
    outputs: int
    """Rows of the whole call."""
    tokens: int
    """Most of a completion."""
    positions: int
    """Most that a sequence reaches."""

    def fits_into(self, other: Size) -> bool:
        return all(mine <= vars(other)[name] for name, mine in vars(self).items())

    def and_also(self, other: Size) -> Size:
        return Size(**{name: max(mine, vars(other)[name]) for name, mine in vars(self).items()})


class Workspace:
    """Everything here stays at one address for as long as the workspace lives."""

    def __init__(
        self,
        policy: Policy,
        size: Size,
        pages: int,
        page: int,
        attention: Attention,
        capture: Capture | None,
        graphs: bool,
    ) -> None:
        """`pages`: those of the cache, where memory allows fewer than `size` asks for."""
        self.size, self.device, self.dtype = size, policy.device, policy.head.dtype
        layers, heads, head_dim = cache_shape(policy)
        self.cache = PagedCache(layers, pages, page, heads, head_dim, self.dtype, self.device)
        self.rows = Rows.blank(size.rows, size.pages_a_row, self.device)
        self.output = Output.empty(size.outputs, size.tokens, self.device)
        self.seed, self.limit = (torch.zeros((), dtype=torch.int64, device=self.device) for _ in range(2))
        self.eos_ids = tuple(policy.eos_ids)
        self.eos = torch.tensor(policy.eos_ids, dtype=torch.int64, device=self.device)
        self.decoder = Decoder(policy, self.cache, size.positions, attention)
        self.graphs = Graphs(capture) if graphs else None
        self.weights = addresses(policy)


def cache_shape(policy: Policy) -> tuple[int, int, int]:
    """-> layers, key heads, head size"""
    shape = text_shape(policy.language_model.config)
    return shape.layers, shape.kv_heads, shape.head_dim


def addresses(policy: Policy) -> tuple[int, ...]:
    """Of all weights: what a captured graph reads."""
    return tuple(p.data_ptr() for p in policy.module.parameters())
