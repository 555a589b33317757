"""The memory that a rollout works in and keeps between calls: cache, rows, output, decoder, and the CUDA graphs."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from vtfast.model.policy import Policy
from vtfast.model.text_shape import text_shape
from vtfast.rollout.attention import DecodeAttention
from vtfast.rollout.decode import Decoder
from vtfast.rollout.graphs import Capture, Graphs
from vtfast.rollout.kv_cache import PagedCache
from vtfast.rollout.row_state import OutputBuffer, RowState


@dataclass(frozen=True)
class WorkspaceSize:
    """What a call of `RolloutEngine.generate` needs."""

    cache_pages: int
    rows: int
    """Rows that run at once."""
    pages_per_row: int
    outputs: int
    """Output rows of the whole call."""
    max_new_tokens: int
    """Longest completion."""
    max_positions: int
    """Longest sequence, prompt and completion."""

    def fits_in(self, other: WorkspaceSize) -> bool:
        return all(getattr(self, field.name) <= getattr(other, field.name) for field in fields(self))

    def maximum(self, other: WorkspaceSize) -> WorkspaceSize:
        """Return a size that holds both."""
        names = [field.name for field in fields(self)]
        return WorkspaceSize(**{name: max(getattr(self, name), getattr(other, name)) for name in names})


class Workspace:
    """All tensors in here keep their addresses for as long as the workspace lives."""

    def __init__(
        self,
        policy: Policy,
        size: WorkspaceSize,
        cache_pages: int,
        page_size: int,
        attention: DecodeAttention,
        capture: Capture | None,
        use_graphs: bool,
    ) -> None:
        """`cache_pages`: fewer than `size.cache_pages` if the memory holds no more. `page_size`: tokens per page."""
        self.size, self.device, self.dtype = size, policy.device, policy.head.dtype
        layers, heads, head_dim = cache_shape(policy)
        self.cache = PagedCache(layers, cache_pages, page_size, heads, head_dim, self.dtype, self.device)
        self.rows = RowState.empty(size.rows, size.pages_per_row, self.device)
        self.output = OutputBuffer.empty(size.outputs, size.max_new_tokens, self.device)
        self.seed, self.limit = (torch.zeros((), dtype=torch.int64, device=self.device) for _ in range(2))
        self.eos_ids = tuple(policy.eos_ids)
        self.eos = torch.tensor(policy.eos_ids, dtype=torch.int64, device=self.device)
        self.decoder = Decoder(policy, self.cache, size.max_positions, attention)
        self.graphs = Graphs(capture) if use_graphs else None
        self.weight_addresses = weight_addresses(policy)


def cache_shape(policy: Policy) -> tuple[int, int, int]:
    """Return layers, key heads and head size."""
    shape = text_shape(policy.language_model.config)
    return shape.layers, shape.kv_heads, shape.head_dim


def weight_addresses(policy: Policy) -> tuple[int, ...]:
    """Return the address of every weight: a captured graph reads them there."""
    return tuple(p.data_ptr() for p in policy.module.parameters())
