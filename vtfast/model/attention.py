"""Attention over a packed row: one function, registered with transformers, over whatever varlen kernel is installed.

A row is cut into segments. The queries of a segment see its keys: its own tokens, or a prompt's tokens followed by its
own. Keys are gathered by index, so that a prompt's keys are computed once and read by all of its completions. Causal
attention is aligned bottom-right, flash-attn's convention: the last query sees the last key.

    flash_attn_3, flash_attn   flash-attn's varlen call, where it is installed (FA3 on Hopper)
    varlen                     `torch.nn.attention.varlen`, the same kernel family inside PyTorch (CUDA)
    sdpa                       PyTorch's SDPA over segments padded to similar lengths: the CPU, and any device

Shapes: T tokens of the row, H query heads, K key heads, d head size, B segments of one padded batch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vtfast.distributed.determinism import flash_attn_kwargs
from vtfast.model.backends import choose
from vtfast.model.row_gather import RowGather
from vtfast.utils.errors import UserError

log = logging.getLogger("vtfast")

LANGUAGE = "vtfast"
"""Name under which transformers knows `language_attention`."""
VISION = "vtfast_flash"
"""Name of `vision_attention`. transformers hands over all images at once only to names with "flash" in them."""
BACKENDS = ("flash_attn_3", "flash_attn", "varlen", "sdpa")
KERNELS = {
    "flash_attn_3": ("flash_attn_interface", "flash_attn_varlen_func"),
    "flash_attn": ("flash_attn", "flash_attn_varlen_func"),
    "varlen": ("torch.nn.attention.varlen", "varlen_attn"),
}
FREE_AREA, WASTE = 1 << 16, 1.25
"""Segments share a padded batch while it holds fewer scores than this, or at most this times those they need."""

Span = tuple[int, int]


def choose_backend(wanted: str = "auto", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """The backend for `device` and `dtype`, the fastest that is there for "auto". Said once in the log.

    Raises UserError for one that is unknown, not installed, or not for this device and dtype.
    """
    flag = "attn_implementation"
    return choose("packed attention", flag, wanted, BACKENDS, _usable, device, dtype)


def _usable(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    if name == "sdpa":
        return True
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False  # flash kernels know half precision alone
    if name == "flash_attn_3" and torch.cuda.get_device_capability(device)[0] != 9:
        return False
    module, function = KERNELS[name]
    try:
        return hasattr(importlib.import_module(module), function)
    except ImportError as error:
        if importlib.util.find_spec(module.split(".")[0]) is not None:  # there, but broken
            log.warning("%s cannot be used: %s", module, error)
        return False


@dataclass
class Layout:
    """Which keys the queries of a row see. Built once per pack, used by every layer."""

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
        starts = (lengths.cumsum(0) - lengths).tolist()
        keys = self.keys or [[(a, a + n)] for a, n in zip(starts, self.lengths, strict=True)]
        self._key_index = [torch.cat([torch.arange(*span) for span in spans]) for spans in keys]
        key_lengths = torch.tensor([len(index) for index in self._key_index], dtype=torch.int64)
        self.max_queries, self.max_keys = int(lengths.max()), int(key_lengths.max())
        self.cu_queries, self.cu_keys = (
            nn.functional.pad(x.cumsum(0), (1, 0)).to(self.device, torch.int32) for x in (lengths, key_lengths)
        )
        if self.keys is not None:
            self.gather = RowGather(torch.cat(self._key_index), self.rows, self.device)
        self._starts = starts

    @functools.cached_property
    def batches(self) -> tuple[list[PaddedBatch], RowGather]:
        """Segments in padded batches of similar sizes, and the way back from their concatenated rows to the row."""
        sizes = list(zip(self.lengths, map(len, self._key_index), strict=True))
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
    queries, keys = (max(column) for column in zip(*sizes, strict=True))
    area = len(sizes) * queries * keys
    return area <= max(FREE_AREA, WASTE * sum(q * k for q, k in sizes))


class PaddedBatch:
    """Segments side by side, padded on the right. Padded queries see real keys and are dropped afterwards."""

    def __init__(self, queries: list[Tensor], keys: list[Tensor], layout: Layout) -> None:
        self.size, self.queries, self.keys = (len(queries), max(map(len, queries)), max(map(len, keys)))
        device, pad = layout.device, functools.partial(nn.utils.rnn.pad_sequence, batch_first=True)
        same = all(q.equal(k) for q, k in zip(queries, keys, strict=True))
        self.take_queries = RowGather(pad(queries, padding_value=-1).flatten(), layout.rows, device)
        self.take_keys = (
            self.take_queries if same else RowGather(pad(keys, padding_value=-1).flatten(), layout.rows, device)
        )
        self.plain_causal = layout.causal and same  # bottom-right and top-left are then the same
        self.visible: Tensor | None = None  # [B, 1, queries, keys]
        key_lengths = torch.tensor([len(k) for k in keys])[:, None, None, None]
        key = torch.arange(self.keys)
        if not layout.causal:
            if int(key_lengths.min()) < self.keys:
                self.visible = (key < key_lengths).to(device)
            return
        query_lengths = torch.tensor([len(q) for q in queries])[:, None, None, None]
        self.last = torch.arange(self.queries)[:, None] + key_lengths - query_lengths
        if not same:
            self.visible = (key <= self.last).to(device)
        self._windows: dict[int, Tensor] = {}

    def mask(self, window: int | None) -> Tensor | None:
        """Who sees whom; `window` limits a query to that many keys, itself included."""
        if window is None or window >= self.keys or not hasattr(self, "last"):
            return self.visible
        if window not in self._windows:
            key = torch.arange(self.keys)
            visible = (key <= self.last) & (key > self.last - window)
            # Padded queries may stand past every key: let them see the last one, their result is dropped.
            visible[..., -1] |= ~visible.any(-1)
            self._windows[window] = visible.to(self.take_queries._index.device)
        return self._windows[window]


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float | None = None, window: int | None = None
) -> Tensor:
    """Attention of a packed row: query [T, H, d], key and value [T, K, d] -> [T, H, d]. Differentiable.

    `window`: keys that a query sees, itself included (sliding-window layers); None for all.
    """
    if layout.backend == "sdpa":
        return _sdpa(query, key, value, layout, scale, window)
    if layout.gather is not None:
        key, value = layout.gather(key), layout.gather(value)
    return _VARLEN[layout.backend](query, key, value, layout, scale, window)


def _sdpa(query, key, value, layout, scale, window) -> Tensor:
    batches, back = layout.batches
    outputs = []
    for batch in batches:
        mask = batch.mask(window)
        q, k, v = (
            take(x).unflatten(0, (batch.size, -1)).transpose(1, 2)
            for take, x in ((batch.take_queries, query), (batch.take_keys, key), (batch.take_keys, value))
        )
        out = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=batch.plain_causal and mask is None,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return back(torch.cat(outputs) if len(outputs) > 1 else outputs[0])


def _window(layout: Layout, window: int | None) -> tuple[int, int]:
    """Keys that a query sees to its left and right in the aligned rows; -1: all."""
    return -1 if window is None else window - 1, 0 if layout.causal else -1


def _flash_attn(function: Callable, query, key, value, layout, scale, window) -> Tensor:
    """FA2's and FA3's call; FA3 knows no dropout, and some of its versions return the log-sum-exp as well."""
    out = function(
        query,
        key,
        value,
        cu_seqlens_q=layout.cu_queries,
        cu_seqlens_k=layout.cu_keys,
        max_seqlen_q=layout.max_queries,
        max_seqlen_k=layout.max_keys,
        softmax_scale=scale,
        causal=layout.causal,
        window_size=_window(layout, window),
        **flash_attn_kwargs(function),
    )
    return out[0] if isinstance(out, tuple) else out


def _flash_attn_2(*arguments) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return _flash_attn(flash_attn_varlen_func, *arguments)


def _flash_attn_3(*arguments) -> Tensor:
    from flash_attn_interface import flash_attn_varlen_func

    return _flash_attn(flash_attn_varlen_func, *arguments)


def _varlen(query, key, value, layout, scale, window) -> Tensor:
    """PyTorch's varlen_attn. Its arguments grew: 2.10 has `is_causal`, later ones a window, the newest `enable_gqa`."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options: dict = {}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    if scale is not None and "scale" in known:
        options["scale"] = scale
    elif scale is not None:
        query = query * (scale * query.shape[-1] ** 0.5)
    if "window_size" in known:
        options["window_size"] = _window(layout, window)
    elif window is not None:
        raise UserError("sliding-window attention needs flash-attn, or a newer PyTorch than this")
    else:
        options["is_causal"] = layout.causal
    ends = layout.cu_queries, layout.cu_keys, layout.max_queries, layout.max_keys
    return varlen_attn(query, key, value, *ends, **options)


_VARLEN = {"flash_attn": _flash_attn_2, "flash_attn_3": _flash_attn_3, "varlen": _varlen}


def language_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    layout: Layout | None = None,
    store: Callable[[int, Tensor, Tensor], None] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, H, T, d] -> [1, T, H, d].

    Without a layout (the model's own forward, generate, the rollout's cache) it is transformers' SDPA. With one there
    is never dropout: a policy with dropout is not its own importance ratio.
    """
    if layout is None:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            sliding_window=sliding_window,
            **kwargs,
        )
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    if store is not None:
        store(module.layer_idx, key, value)
    return attend(query, key, value, layout, scaling, sliding_window)[None], None


class TowerLayouts:
    """Layouts of one pass of a tower whose blocks take turns with several (Qwen2.5-VL: whole images, and windows)."""

    def __init__(self, backend: str, device: torch.device | str) -> None:
        self.backend, self.device = backend, device
        self._known: dict[int, tuple[Tensor, Layout]] = {}

    def of(self, cu_seqlens: Tensor) -> Layout:
        """`cu_seqlens`: [segments + 1], where each begins, and the end of the last one."""
        if id(cu_seqlens) not in self._known:  # the tensor is kept, so that its id stays its own
            lengths = cu_seqlens.diff().tolist()
            layout = Layout(lengths, causal=False, backend=self.backend, device=self.device)
            self._known[id(cu_seqlens)] = cu_seqlens, layout
        return self._known[id(cu_seqlens)][1]


def vision_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    layout: Layout | TowerLayouts | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The vision tower's: patches of an image, or of a window, see each other. query [1, H, T, d] -> [1, T, H, d]."""
    if layout is None:  # the tower was entered by the model's own forward
        layout = TowerLayouts(choose_backend("auto", query.device, query.dtype), query.device)
    if isinstance(layout, TowerLayouts):
        layout = layout.of(cu_seq_lens_q)
    rows = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    return attend(*rows, layout, scaling)[None], None


AttentionInterface.register(LANGUAGE, language_attention)
AttentionMaskInterface.register(LANGUAGE, sdpa_mask)
AttentionInterface.register(VISION, vision_attention)
