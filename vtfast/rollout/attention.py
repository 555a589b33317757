"""Which kernel a decode step's attention runs on: one query a row over the pages of the cache.

    flash_attn_3, flash_attn   flash-attn's call over a paged cache, where it is installed (FA3 on Hopper)
    triton                     `vtfast_kernels.paged_attention`: reads a group's shared pages once for its G rows
    varlen                     `torch.nn.attention.varlen` with a block table, in versions of PyTorch that have one
    torch                      gathered pages and matmuls: the CPU, and any device

All but the last can be captured in a CUDA graph: lengths and pages are read on the device, splits depend on the number
of rows alone. None of the packages has to be there.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from vtfast_kernels.paged_attention import paged_attention
from vtfast_kernels.pages import Pages

from vtfast.model.backends import select_backend

Attention = Callable[[Tensor, Tensor, Tensor, Pages, float], Tensor]
"""(query [R, H, d], keys and values [B, page, K, d], pages, scale) -> [R, H, d]"""
BACKENDS = ("flash_attn_3", "flash_attn", "triton", "varlen", "torch")
MULTIPROCESSORS = 132
"""Of an H100 or H200. A fixed number, so that how a context is split depends on the number of rows alone."""


def decode_attention(
    wanted: str = "auto", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Attention:
    """The kernel for `device` and `dtype`; the first usable one of `BACKENDS` for "auto". Said once in the log.

    Raises UserError for one that is unknown, not installed, or not for this device and dtype.
    """
    flag = "rollout_attention"
    return _CALLS[select_backend("decode attention", flag, wanted, BACKENDS, _usable, device, dtype)]


def _usable(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    if name == "torch":
        return True
    if device.type != "cuda":
        return False
    if name == "triton":
        return True
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    if name == "flash_attn_3" and torch.cuda.get_device_capability(device)[0] != 9:
        return False
    module, function = {
        "flash_attn_3": ("flash_attn_interface", "flash_attn_with_kvcache"),
        "flash_attn": ("flash_attn", "flash_attn_with_kvcache"),
        "varlen": ("torch.nn.attention.varlen", "varlen_attn"),
    }[name]
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ImportError:
        return False
    if name == "varlen":
        return found is not None and "block_table" in inspect.signature(found).parameters
    return found is not None


def _splits(rows: int, heads: int) -> int:
    """Pieces of the context, so that rows x key heads x pieces fill the GPU."""
    return max(1, min(32, MULTIPROCESSORS // (rows * heads)))


def _flash(function: Callable, table: str, query, keys, values, pages: Pages, scale) -> Tensor:
    """`table`: the argument's name; FA3 renamed it, and some of its versions return the log-sum-exp as well."""
    out = function(
        query[:, None],
        keys,
        values,
        cache_seqlens=pages.lengths,
        softmax_scale=scale,
        causal=True,
        num_splits=_splits(len(query), keys.shape[2]),
        **{table: pages.block_table},
    )
    return (out[0] if isinstance(out, tuple) else out)[:, 0]


def _flash_attn(*arguments) -> Tensor:
    from flash_attn import flash_attn_with_kvcache

    return _flash(flash_attn_with_kvcache, "block_table", *arguments)


def _flash_attn_3(*arguments) -> Tensor:
    from flash_attn_interface import flash_attn_with_kvcache

    return _flash(flash_attn_with_kvcache, "page_table", *arguments)


def _varlen(query, keys, values, pages: Pages, scale) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.arange(len(query) + 1, dtype=torch.int32, device=query.device)
    most = pages.block_table.shape[1] * pages.page
    options = {"num_splits": _splits(len(query), keys.shape[2]), "enable_gqa": True}
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn(
        query,
        keys,
        values,
        ends,
        None,
        1,
        most,
        scale=scale,
        seqused_k=pages.lengths,
        block_table=pages.block_table,
        **{name: x for name, x in options.items() if name in known},
    )


def _ours(impl: str, query, keys, values, pages: Pages, scale) -> Tensor:
    return paged_attention(query, keys, values, pages, scale=scale, impl=impl)


_CALLS: dict[str, Attention] = {
    "flash_attn_3": _flash_attn_3,
    "flash_attn": _flash_attn,
    "triton": functools.partial(_ours, "triton"),
    "varlen": _varlen,
    "torch": functools.partial(_ours, "torch"),
}
