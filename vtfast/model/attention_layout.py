"""Which keys the queries of a packed row attend to.

A row is cut into segments. The queries of a segment see its keys: its own tokens, or a prompt's tokens followed by its
own. Keys are gathered by index, so a prompt's keys are computed once and read by all of its completions. Causal
attention is aligned bottom-right, flash-attn's convention: the last query sees the last key.

Shapes: T tokens of the row, B segments of one padded batch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vtfast.model.row_gather import RowGather

FREE_AREA, MAX_WASTE = 1 << 16, 1.25
"""Segments share a padded batch while it holds fewer scores than FREE_AREA, or at most MAX_WASTE times the scores that
they need."""

Span = tuple[int, int]


@dataclass
class AttentionLayout:
    """The segments of a row. Built once per pack, used by every layer."""

    lengths: Sequence[int]
    """Tokens of each segment; the segments follow each other and fill the row."""
    keys: Sequence[Sequence[Span]] | None = None
    """[segment][span]: (start, stop) in the row, in the order of attention. None: each segment sees itself."""
    causal: bool = True
    backend: str = "sdpa"
    device: torch.device | str = "cpu"
    gather: RowGather | None = field(init=False, default=None)
    """Row -> keys of all segments one after the other; None where that is the row itself."""

    def __post_init__(self) -> None:
        lengths = torch.tensor(self.lengths, dtype=torch.int64)
        self.rows = int(lengths.sum())
        self._starts: list[int] = (lengths.cumsum(0) - lengths).tolist()
        keys = self.keys or [[(start, start + n)] for start, n in zip(self._starts, self.lengths, strict=True)]
        self._key_index = [torch.cat([torch.arange(*span) for span in spans]) for spans in keys]
        key_lengths = torch.tensor([len(index) for index in self._key_index], dtype=torch.int64)
        self.max_queries, self.max_keys = int(lengths.max()), int(key_lengths.max())
        self.cu_queries, self.cu_keys = (
            nn.functional.pad(x.cumsum(0), (1, 0)).to(self.device, torch.int32) for x in (lengths, key_lengths)
        )
        if self.keys is not None:
            self.gather = RowGather(torch.cat(self._key_index), self.rows, self.device)

    @functools.cached_property
    def batches(self) -> tuple[list[PaddedBatch], RowGather]:
        """Segments in padded batches of similar sizes, and the gather from their concatenated rows back to the row."""
        sizes = [(n, len(index)) for n, index in zip(self.lengths, self._key_index, strict=True)]
        batches: list[list[int]] = []
        for s in sorted(range(len(sizes)), key=lambda s: (sizes[s][1] - sizes[s][0], *sizes[s])):
            if batches and _fits([sizes[i] for i in [*batches[-1], s]]):
                batches[-1].append(s)
            else:
                batches.append([s])
        padded, back, offset = [], torch.empty(self.rows, dtype=torch.int64), 0
        for members in batches:
            queries = [self._starts[s] + torch.arange(self.lengths[s]) for s in members]
            batch = PaddedBatch(queries, [self._key_index[s] for s in members], self)
            for b, rows in enumerate(queries):
                back[rows] = offset + b * batch.queries + torch.arange(len(rows))
            offset += len(members) * batch.queries
            padded.append(batch)
        return padded, RowGather(back, offset, self.device)


def _fits(sizes: list[tuple[int, int]]) -> bool:
    """Whether segments of these (queries, keys) may share a padded batch."""
    queries, keys = (max(column) for column in zip(*sizes, strict=True))
    area = len(sizes) * queries * keys
    return area <= max(FREE_AREA, MAX_WASTE * sum(q * k for q, k in sizes))


class PaddedBatch:
    """Segments side by side, padded on the right. Padded queries see real keys and are dropped afterwards."""

    def __init__(self, queries: list[Tensor], keys: list[Tensor], layout: AttentionLayout) -> None:
        """`queries`, `keys`: rows of each segment's queries and keys."""
        self.size, self.queries, self.keys = len(queries), max(map(len, queries)), max(map(len, keys))
        self.device = layout.device
        self_attention = all(q.equal(k) for q, k in zip(queries, keys, strict=True))
        self.gather_queries = self._gather(queries, layout)
        self.gather_keys = self.gather_queries if self_attention else self._gather(keys, layout)
        self.plain_causal = layout.causal and self_attention  # bottom-right and top-left are then the same
        self.visible: Tensor | None = None
        """[B, 1, queries, keys]; None where SDPA needs no mask."""
        self.last_key: Tensor | None = None
        """[B, 1, queries, 1] on the CPU: the last key that each query sees; None without causality."""
        self._windows: dict[int, Tensor] = {}
        key_lengths = torch.tensor([len(k) for k in keys])[:, None, None, None]
        key = torch.arange(self.keys)
        if layout.causal:
            query_lengths = torch.tensor([len(q) for q in queries])[:, None, None, None]
            self.last_key = torch.arange(self.queries)[:, None] + key_lengths - query_lengths
            if not self_attention:
                self.visible = (key <= self.last_key).to(self.device)
        elif int(key_lengths.min()) < self.keys:
            self.visible = (key < key_lengths).to(self.device)

    def _gather(self, rows: list[Tensor], layout: AttentionLayout) -> RowGather:
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        return RowGather(padded.flatten(), layout.rows, layout.device)

    def mask(self, window: int | None) -> Tensor | None:
        """Which keys each query sees, [B, 1, queries, keys]; `window` limits a query to so many keys, itself
        included."""
        if window is None or window >= self.keys or self.last_key is None:
            return self.visible
        if window not in self._windows:
            key = torch.arange(self.keys)
            visible = (key <= self.last_key) & (key > self.last_key - window)
            # A padded query may see no key at all: let it see the last one, since its result is dropped.
            visible[..., -1] |= ~visible.any(-1)
            self._windows[window] = visible.to(self.device)
        return self._windows[window]


class VisionLayouts:
    """Layouts of one forward of an encoder whose blocks alternate between several (Qwen2.5-VL: images and windows)."""

    def __init__(self, backend: str, device: torch.device | str) -> None:
        self.backend, self.device = backend, device
        self._layouts: dict[int, tuple[Tensor, AttentionLayout]] = {}
        """Layouts by id of `cu_seqlens`; keeping the tensor keeps its id unique."""

    def layout_of(self, cu_seqlens: Tensor) -> AttentionLayout:
        """`cu_seqlens`: [segments + 1], the start of each segment and the end of the last."""
        if id(cu_seqlens) not in self._layouts:
            lengths = cu_seqlens.diff().tolist()
            layout = AttentionLayout(lengths, causal=False, backend=self.backend, device=self.device)
            self._layouts[id(cu_seqlens)] = cu_seqlens, layout
        return self._layouts[id(cu_seqlens)][1]
