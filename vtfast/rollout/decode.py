"""One token for every row: the language model's layers over the paged cache, with Hugging Face's own weights.

RoPE position = cache length + rope_delta on all three axes; cache slot = cache length. They differ because a prompt
with images ends at a smaller position than its number of tokens.

A layer is eight kernels and its attention: add + norm, qkv, rope + append, attention, o, add + norm, gate and up,
silu * up, down. Nothing is read on the host, so that a step can be captured in a CUDA graph.

Shapes: R rows, D hidden size, H query heads, K key heads, d head size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from vtfast_kernels.add_rms_norm import add_rms_norm
from vtfast_kernels.page_table import Pages, PrefixCache
from vtfast_kernels.rope_append import rope_append
from vtfast_kernels.silu_mul import silu_mul

from vtfast.model.policy import Policy
from vtfast.rollout.attention import DecodeAttention
from vtfast.rollout.kv_cache import PagedCache
from vtfast.rollout.row_state import RowState


class Decoder:
    """`step(rows)` returns hidden states [R, D], with the weights as they were at the last `refresh`."""

    def __init__(self, policy: Policy, cache: PagedCache, max_positions: int, attention: DecodeAttention) -> None:
        """`max_positions`: longest sequence of a row; length of the RoPE tables."""
        self.policy, self.cache, self.attend = policy, cache, attention.attend
        model: Any = policy.language_model
        self.model = model
        self.layers = [_Layer(layer) for layer in model.layers]
        positions = torch.arange(max_positions, device=policy.device)
        axes = (3, 1, -1) if policy.vision is not None else (1, -1)
        cos, sin = model.rotary_emb(policy.head[:1], positions.expand(axes))
        self.cos, self.sin = cos[0].contiguous(), sin[0].contiguous()  # [positions, d]

    def refresh(self) -> None:
        """Copy the trainer's q/k/v and gate/up weights into the fused matmuls; other layers use the trainer's
        tensors."""
        for layer in self.layers:
            layer.refresh()

    def step(self, rows: RowState, prefix_cache: PrefixCache | None = None) -> Tensor:
        """Feed each row's newest token. `prefix_cache`: see `Pages`; the caller drops it when rows come or go."""
        page_size = self.cache.page_size
        position = rows.length + rows.rope_delta
        cos, sin = self.cos[position], self.sin[position]
        newest_page = rows.block_table.gather(1, (rows.length // page_size)[:, None])[:, 0]
        slot = newest_page.long() * page_size + rows.length % page_size
        lengths = (rows.length + 1).to(torch.int32)
        pages = Pages(rows.block_table, lengths, rows.group, rows.num_shared_pages, page_size, prefix_cache)
        residual, mlp_output = self.policy.embed(rows.token), None
        for number, layer in enumerate(self.layers):
            keys, values = self.cache.keys[number], self.cache.values[number]
            residual, h = _rms_norm(layer.module.input_layernorm, residual, mlp_output)
            q = rope_append(layer.qkv(h), cos, sin, slot, keys, values)
            attended = self.attend(q, keys, values, pages, layer.scale)
            residual, h = _rms_norm(layer.module.post_attention_layernorm, residual, layer.output(attended))
            mlp_output = layer.mlp(h)
        return _rms_norm(self.model.norm, residual, mlp_output)[1]


def _rms_norm(module: Any, residual: Tensor, output: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return residual + output [R, D], and its norm."""
    return add_rms_norm(residual, output, module.weight, eps=module.variance_epsilon)


class _Layer:
    """A decoder layer of Hugging Face's (Qwen2's or Qwen3's), with q, k and v, and gate and up, as one matmul each."""

    def __init__(self, module: Any) -> None:
        self.module, attention, mlp = module, module.self_attn, module.mlp
        self.scale: float = attention.scaling
        self._qkv = _FusedLinear(attention.q_proj, attention.k_proj, attention.v_proj)
        self._gate_up = _FusedLinear(mlp.gate_proj, mlp.up_proj)
        self._o = attention.o_proj
        self._q_norm, self._k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self._d: int = attention.head_dim
        self._heads = [layer.out_features // self._d for layer in self._qkv.layers]

    def refresh(self) -> None:
        self._qkv.refresh()
        self._gate_up.refresh()

    def qkv(self, x: Tensor) -> Tensor:
        """[R, (H + 2 K) d], queries and keys normalised by head if the family does so (Qwen3)."""
        qkv = self._qkv(x)
        if self._q_norm is None:
            return qkv
        q, k, v = qkv.unflatten(1, (-1, self._d)).split(self._heads, dim=1)
        q, k = (
            _rms_norm(norm, part.reshape(-1, self._d), None)[1].view_as(part)
            for norm, part in ((self._q_norm, q), (self._k_norm, k))
        )
        return torch.cat([q, k, v], dim=1).flatten(1)

    def output(self, attended: Tensor) -> Tensor:
        return self._o(attended.flatten(1))

    def mlp(self, x: Tensor) -> Tensor:
        return self.module.mlp.down_proj(silu_mul(self._gate_up(x)))


class _FusedLinear:
    """Linear layers of one input as one matmul, over a copy of their weights. Layers with LoRA adapters are called."""

    def __init__(self, *layers: Any) -> None:
        self.layers = layers
        self.fusable = all(type(layer) is nn.Linear for layer in layers)
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def refresh(self) -> None:
        if not self.fusable:
            return
        weights = [layer.weight for layer in self.layers]
        biases = [layer.bias for layer in self.layers if layer.bias is not None]
        if self.weight is None:
            self.weight = torch.cat(weights)
            self.bias = torch.cat(biases) if biases else None
            return
        torch.cat(weights, out=self.weight)  # at the same address, which graphs have captured
        if self.bias is not None:
            torch.cat(biases, out=self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        if not self.fusable:
            return torch.cat([layer(x) for layer in self.layers], dim=-1)
        assert self.weight is not None, "refresh() comes first"
        return linear(x, self.weight, self.bias)
