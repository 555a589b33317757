"""What PyTorch has for CUDA alone, in plain operations on CPU tensors, with CUDA's demands on its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.attention.varlen  # registers the operations
from torch import Tensor


def addmm_out(acc: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, *, out: Tensor) -> Tensor:
    assert a.dtype == b.dtype != dtype == acc.dtype == torch.float32
    return out.copy_(acc + a.to(dtype) @ b.to(dtype))


def mm_fp32(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    assert a.dtype == b.dtype != dtype == torch.float32
    return a.to(dtype) @ b.to(dtype)


def mm_fp32_out(a: Tensor, b: Tensor, dtype: torch.dtype, *, out: Tensor) -> Tensor:
    assert out.dtype == dtype
    return out.copy_(mm_fp32(a, b, dtype))


def _check(query: Tensor, key: Tensor, value: Tensor, *places: Tensor | None) -> None:
    """What flash-attn demands."""
    for x in (query, key, value):
        assert x.dtype in (torch.bfloat16, torch.float16) and x.dtype == query.dtype
        assert x.stride(-1) == 1 and x.shape[-1] % 8 == 0
    assert all(x is None or (x.dtype == torch.int32 and x.is_contiguous()) for x in places)
    assert key.dim() == 3 or key.shape[1] % 256 == 0, "pages"


def _weights(q: Tensor, k: Tensor, scale: float, window: list[int]) -> Tensor:
    """Softmax of one sequence [H, queries, keys], bottom-right aligned."""
    place = torch.arange(len(q))[:, None] + len(k) - len(q)
    at = torch.arange(len(k))
    hidden = torch.zeros(len(q), len(k), dtype=torch.bool)
    if window[0] >= 0:
        hidden |= at < place - window[0]
    if window[1] >= 0:
        hidden |= at > place + window[1]
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def _spans(ends: Tensor) -> list[slice]:
    return [slice(a, b) for a, b in zip(ends.tolist(), ends.tolist()[1:], strict=False)]


def varlen_forward(
    query,
    key,
    value,
    ends_q,
    ends_k,
    max_q,
    max_k,
    is_causal=False,
    scale=None,
    window=None,
    enable_gqa=False,
    used=None,
    table=None,
    splits=None,
) -> tuple[Tensor, Tensor, Tensor]:
    assert max_q == int(ends_q.diff().max()) and is_causal == (window == [-1, 0])
    assert max_k == (int(ends_k.diff().max()) if table is None else table.shape[1] * key.shape[1])
    assert enable_gqa or query.shape[1] == key.shape[-2]
    _check(query, key, value, ends_q, ends_k, used, table)
    scale, window = scale or query.shape[-1] ** -0.5, window or [-1, -1]
    out = torch.empty_like(query)
    for s, mine in enumerate(_spans(ends_q)):
        if table is None:
            k, v = (x[_spans(ends_k)[s]] for x in (key, value))
        else:
            k, v = (x[table[s].long()].flatten(0, 1)[: used[s]] for x in (key, value))
        k, v = (x.float().repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (k, v))
        weight = _weights(query[mine].float(), k, scale, window)
        out[mine] = torch.einsum("hqk,khd->qhd", weight, v).to(out.dtype)
    lse = query.new_zeros(query.shape[1::-1], dtype=torch.float32)  # the backward here does without
    return out, lse, torch.zeros(2, dtype=torch.uint64)


def varlen_backward(
    grad, query, key, value, out, lse, ends_q, ends_k, max_q, max_k, is_causal, rng, scale=None, window=None
) -> tuple[Tensor, ...]:
    scale, window = scale or query.shape[-1] ** -0.5, window or [-1, -1]
    grads = [torch.empty_like(x) for x in (query, key, value)]
    for mine, seen in zip(_spans(ends_q), _spans(ends_k), strict=True):
        q, g = query[mine].float(), grad[mine].float()
        k, v = (x[seen].float().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (key, value))
        weight = _weights(q, k, scale, window)
        d_weight = torch.einsum("qhd,khd->hqk", g, v)
        d_scores = weight * (d_weight - (weight * d_weight).sum(-1, keepdim=True)) * scale
        made = (
            torch.einsum("hqk,khd->qhd", d_scores, k),
            torch.einsum("hqk,qhd->khd", d_scores, q),
            torch.einsum("hqk,qhd->khd", weight, g),
        )
        for whole, part, place in zip(grads, made, (mine, seen, seen), strict=True):
            whole[place] = part.unflatten(1, (whole.shape[1], -1)).sum(2).to(whole.dtype)
    return tuple(grads)


ON_CPU: dict[Any, Callable] = {
    torch.ops.aten.addmm.dtype_out: addmm_out,
    torch.ops.aten.mm.dtype: mm_fp32,
    torch.ops.aten.mm.dtype_out: mm_fp32_out,
    torch.ops.torch_attn._varlen_attn.default: varlen_forward,
    torch.ops.torch_attn._varlen_attn_backward.default: varlen_backward,
}
