"""Attention over a packed row: one function, registered with transformers, over the varlen kernels that are installed.

    flash_attn_3, flash_attn   flash-attn's varlen call, where it is installed (FA3 on Hopper)
    flash_attn_4               FlashAttention-4's (a pure Python wheel, nothing to compile), Hopper and newer
    varlen                     `torch.nn.attention.varlen`, the same kernel family inside PyTorch (CUDA)
    sdpa                       PyTorch's SDPA over segments padded to similar lengths: the CPU, and any device

Shapes: T tokens of the row, H query heads, K key heads, d head size.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vtfast.distributed.determinism import flash_attn_kwargs
from vtfast.model.attention_layout import AttentionLayout, VisionLayouts
from vtfast.model.select_backend import select_backend

log = logging.getLogger("vtfast")

LANGUAGE_ATTENTION = "vtfast"
"""Name under which transformers knows `language_attention`."""
VISION_ATTENTION = "vtfast_flash"
"""Name of `vision_attention`. transformers passes all images at once only to names that contain "flash"."""
BACKENDS = ("flash_attn_3", "flash_attn_4", "flash_attn", "varlen", "sdpa")
KERNELS = {
    "flash_attn_3": ("flash_attn_interface", "flash_attn_varlen_func"),
    "flash_attn_4": ("flash_attn.cute", "flash_attn_varlen_func"),
    "flash_attn": ("flash_attn", "flash_attn_varlen_func"),
    "varlen": ("torch.nn.attention.varlen", "varlen_attn"),
}
"""Module and function of each varlen kernel."""


def choose_backend(
    requested: str = "auto", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> str:
    """The requested backend, or for "auto" the fastest that is usable for `device` and `dtype`. Logged once.

    Raises UserError for a backend that is unknown, not installed, or not for this device and dtype.
    """
    return select_backend("packed attention", "attn_implementation", requested, BACKENDS, _usable, device, dtype)


def _usable(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    if name == "sdpa":
        return True
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False  # flash kernels support half precision only
    major = torch.cuda.get_device_capability(device)[0]
    if (name == "flash_attn_3" and major != 9) or (name == "flash_attn_4" and major < 9):
        return False
    module, function = KERNELS[name]
    try:
        return hasattr(importlib.import_module(module), function)
    except ImportError as error:
        if importlib.util.find_spec(module.split(".")[0]) is not None:  # installed, but broken
            log.warning("%s cannot be used: %s", module, error)
        return False


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: AttentionLayout,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention of a packed row: query [T, H, d], key and value [T, K, d] -> [T, H, d]. Differentiable.

    `window`: keys that a query sees, itself included (sliding-window layers); None for all.
    """
    if layout.backend == "sdpa":
        return _sdpa(query, key, value, layout, scale, window)
    if layout.gather is not None:
        key, value = layout.gather(key), layout.gather(value)
    if layout.backend == "varlen":
        return _varlen(query, key, value, layout, scale, window)
    return _flash_attn(query, key, value, layout, scale, window)


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout, scale: float | None, window: int | None
) -> Tensor:
    batches, back = layout.batches
    outputs = []
    for batch in batches:
        mask = batch.mask(window)
        q, k, v = (
            gather(x).unflatten(0, (batch.size, -1)).transpose(1, 2)
            for gather, x in ((batch.gather_queries, query), (batch.gather_keys, key), (batch.gather_keys, value))
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


def _window_size(layout: AttentionLayout, window: int | None) -> tuple[int, int]:
    """Keys that a query sees to its left and right in the aligned rows; -1: all."""
    return -1 if window is None else window - 1, 0 if layout.causal else -1


def _flash_attn(
    query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout, scale: float | None, window: int | None
) -> Tensor:
    """The varlen call of FA2, FA3 and FA4. Some versions return the log-sum-exp as well."""
    module, name = KERNELS[layout.backend]
    function = getattr(importlib.import_module(module), name)
    options: dict[str, Any] = {"window_size": _window_size(layout, window)}
    if layout.backend == "flash_attn_4":  # None: all keys; splits would add up in an order of their own
        sizes = (None if size < 0 else size for size in options["window_size"])
        options = {"window_size": (None, None) if window is None else tuple(sizes), "num_splits": 1}
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
        **options,
        **flash_attn_kwargs(function),
    )
    return out[0] if isinstance(out, tuple) else out


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout, scale: float | None, window: int | None
) -> Tensor:
    """PyTorch's varlen_attn, which repeats key heads itself (`enable_gqa`) from 2.12 on."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"scale": scale, "window_size": _window_size(layout, window)}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        else:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    lengths = layout.cu_queries, layout.cu_keys, layout.max_queries, layout.max_keys
    out = varlen_attn(query, key, value, *lengths, **options)
    assert isinstance(out, Tensor)  # a tuple only with `return_aux`
    return out


def language_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    layout: AttentionLayout | None = None,
    kv_callback: Callable[[int, Tensor, Tensor], None] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, H, T, d] -> [1, T, H, d].

    Without a layout (the model's own forward and `generate`) it is transformers' SDPA. With one there is never
    dropout: the ratio of a policy with dropout to itself would not be 1.
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
    if kv_callback is not None:
        assert isinstance(module.layer_idx, int)
        kv_callback(module.layer_idx, key, value)
    return packed_attention(query, key, value, layout, scaling, sliding_window)[None], None


def vision_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    layout: AttentionLayout | VisionLayouts | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The vision encoder's: patches of an image, or of a window, see each other. query [1, H, T, d] -> [1, T, H, d]."""
    if layout is None:  # called by the model's own forward
        layout = VisionLayouts(choose_backend("auto", query.device, query.dtype), query.device)
    if isinstance(layout, VisionLayouts):
        assert cu_seq_lens_q is not None
        layout = layout.layout_of(cu_seq_lens_q)
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    return packed_attention(query, key, value, layout, scaling)[None], None


AttentionInterface.register(LANGUAGE_ATTENTION, language_attention)
AttentionMaskInterface.register(LANGUAGE_ATTENTION, sdpa_mask)
AttentionInterface.register(VISION_ATTENTION, vision_attention)
