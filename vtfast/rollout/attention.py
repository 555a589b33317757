"""The attention backends of a decode step: one query per row over the pages of the cache.

    flash_attn_3, flash_attn   flash-attn's call over a paged cache, if it is installed (FA3 on Hopper)
    triton                     `vtfast_kernels.paged_attention`: reads a group's shared pages once for its G rows
    varlen                     `torch.nn.attention.varlen` with a block table, in versions of PyTorch that have one
    torch                      gathered pages and matmuls: the CPU, and any device

All but the last can be captured in a CUDA graph: lengths and pages are read on the device, and the number of splits
depends on the number of rows only. All packages are optional.

Shapes: R rows, H query heads, K key heads, d head size, B pages of the pool.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vtfast_kernels.page_table import Pages
from vtfast_kernels.paged_attention import paged_attention

from vtfast.model.select_backend import select_backend

MULTIPROCESSORS = 132
"""Of an H100 or H200. A fixed number, so that how a context is split depends on the number of rows only."""
FUNCTIONS = {
    "flash_attn_3": ("flash_attn_interface", "flash_attn_with_kvcache"),
    "flash_attn": ("flash_attn", "flash_attn_with_kvcache"),
    "varlen": ("torch.nn.attention.varlen", "varlen_attn"),
}
"""Module and function of each backend that is an optional package."""


@dataclass(frozen=True)
class DecodeAttention:
    """A backend of decode attention."""

    attend: Callable[[Tensor, Tensor, Tensor, Pages, float], Tensor]
    """(query [R, H, d], keys and values [B, page size, K, d], pages, scale) -> [R, H, d]."""
    capturable: bool = True
    """Whether a CUDA graph can capture it."""


def _import_function(backend: str) -> Any:
    """Return the function of an optional package, None if there is none."""
    module, function = FUNCTIONS[backend]
    try:
        return getattr(importlib.import_module(module), function, None)
    except ImportError:
        return None


def _num_splits(rows: int, heads: int) -> int:
    """Return into how many parts a context is split, so that rows x key heads x parts fill the GPU."""
    return max(1, min(32, MULTIPROCESSORS // (rows * heads)))


def _flash(backend: str, table: str, query: Tensor, keys: Tensor, values: Tensor, pages: Pages, scale: float) -> Tensor:
    """flash-attn. `table` names the block table's argument: FA3 renamed it, and may return the log-sum-exp as well."""
    out = _import_function(backend)(
        query[:, None],
        keys,
        values,
        cache_seqlens=pages.lengths,
        softmax_scale=scale,
        causal=True,
        num_splits=_num_splits(len(query), keys.shape[2]),
        **{table: pages.block_table},
    )
    return (out[0] if isinstance(out, tuple) else out)[:, 0]


def _varlen(query: Tensor, keys: Tensor, values: Tensor, pages: Pages, scale: float) -> Tensor:
    varlen_attn = _import_function("varlen")
    query_ends = torch.arange(len(query) + 1, dtype=torch.int32, device=query.device)
    max_length = pages.block_table.shape[1] * pages.page_size
    options = {"num_splits": _num_splits(len(query), keys.shape[2]), "enable_gqa": True}
    known = inspect.signature(varlen_attn).parameters  # versions of PyTorch differ in them
    return varlen_attn(
        query,
        keys,
        values,
        query_ends,
        None,
        1,
        max_length,
        scale=scale,
        seqused_k=pages.lengths,
        block_table=pages.block_table,
        **{name: x for name, x in options.items() if name in known},
    )


def _paged(impl: str, query: Tensor, keys: Tensor, values: Tensor, pages: Pages, scale: float) -> Tensor:
    return paged_attention(query, keys, values, pages, scale=scale, impl=impl)


BACKENDS = {
    "flash_attn_3": DecodeAttention(functools.partial(_flash, "flash_attn_3", "page_table")),
    "flash_attn": DecodeAttention(functools.partial(_flash, "flash_attn", "block_table")),
    "triton": DecodeAttention(functools.partial(_paged, "triton")),
    "varlen": DecodeAttention(_varlen),
    "torch": DecodeAttention(functools.partial(_paged, "torch"), capturable=False),
}
"""By name, in the order in which "auto" tries them."""


def decode_attention(
    name: str = "auto", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> DecodeAttention:
    """Return the named backend, or for "auto" the first usable one of `BACKENDS`. The choice is logged once.

    Raises UserError for one that is unknown, not installed, or not for this device and dtype.
    """
    flag = "rollout_attention"
    return BACKENDS[select_backend("decode attention", flag, name, tuple(BACKENDS), is_usable, device, dtype)]


def is_usable(backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    if backend == "torch":
        return True
    if device.type != "cuda":
        return False
    if backend == "triton":
        return True
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    if backend == "flash_attn_3" and torch.cuda.get_device_capability(device)[0] != 9:
        return False
    function = _import_function(backend)
    if function is None:
        return False
    return backend != "varlen" or "block_table" in inspect.signature(function).parameters
