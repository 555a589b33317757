"""One token for every row: the language model's layers over the paged cache, with Hugging Face's own weights.

M-RoPE in decode: all three axes stand at the cache length + the row's own delta (a prompt with images ends at a smaller
angle than its number of tokens), while the slot in the cache is the cache length. The two are never mixed.

A layer is eight kernels and its attention: add + norm, qkv, rope + append, attention, o, add + norm, gate and up,
silu * up, down. Nothing is read on the host, so that a step can be captured in a CUDA graph.

Shapes: R rows, D hidden size, H query heads, K key heads, d head size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from vtfast_kernels.add_rms_norm import add_rms_norm
from vtfast_kernels.pages import Pages
from vtfast_kernels.rope_append import rope_append
from vtfast_kernels.silu_mul import silu_mul

from vtfast.model.policy import Policy
from vtfast.rollout.attention import Attention
from vtfast.rollout.cache import PagedCache
from vtfast.rollout.decode_state import Rows


class Decoder:
    """`step(rows) -> hidden [R, D]`, with the weights as they were at the last `refresh`."""

    def __init__(self, policy: Policy, cache: PagedCache, positions: int, attention: Attention) -> None:
        """`positions`: most that a row can reach; their rotations are tabulated."""
        self.policy, self.cache, self.attention = policy, cache, attention
        model = policy.language_model
        self.layers = [_Layer(layer) for layer in model.layers]
        places = torch.arange(positions, device=policy.device)
        axes = (3, 1, -1) if policy.vision is not None else (1, -1)
        cos, sin = model.rotary_emb(policy.head[:1], places.expand(axes))
        self.cos, self.sin = cos[0].contiguous(), sin[0].contiguous()  # [positions, d]

    def refresh(self) -> None:
        """Copy the weights that are kept joined. All others are the trainer's own tensors."""
        for layer in self.layers:
            layer.refresh()

    def step(self, rows: Rows, memory: dict | None = None) -> Tensor:
        """Take in each row's newest token. `memory`: see `Pages`; its owner drops it when rows come or go."""
        page = self.cache.page
        angle = rows.length + rows.delta
        cos, sin = self.cos[angle], self.sin[angle]
        pages = rows.table.gather(1, (rows.length // page)[:, None])[:, 0]
        slot = pages.long() * page + rows.length % page
        lengths = (rows.length + 1).to(torch.int32)
        seen = Pages(rows.table, lengths, rows.group, rows.shared, page, memory)
        x, delta = self.policy.embed(rows.token), None
        for number, layer in enumerate(self.layers):
            keys, values = self.cache.keys[number], self.cache.values[number]
            x, h = _norm(layer.module.input_layernorm, x, delta)
            q = rope_append(layer.qkv(h), cos, sin, slot, keys, values)
            attended = self.attention(q, keys, values, seen, layer.scale)
            x, h = _norm(layer.module.post_attention_layernorm, x, layer.output(attended))
            delta = layer.mlp(h)
        return _norm(self.policy.language_model.norm, x, delta)[1]


def _norm(module: nn.Module, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
    return add_rms_norm(x, delta, module.weight, eps=module.variance_epsilon)


class _Layer:
    """A decoder layer of Hugging Face's, with q, k and v, and gate and up, as one matmul each."""

    def __init__(self, module: nn.Module) -> None:
        self.module, attention, mlp = module, module.self_attn, module.mlp
        self.scale = attention.scaling
        self._qkv = _Joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self._gate_up = _Joined(mlp.gate_proj, mlp.up_proj)
        self._o = attention.o_proj
        self._norms = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self._heads, self._d = self._qkv.outputs(attention.head_dim), attention.head_dim

    def refresh(self) -> None:
        self._qkv.refresh()
        self._gate_up.refresh()

    def qkv(self, x: Tensor) -> Tensor:
        """[R, (H + 2 K) d], queries and keys normalised by head where the family does so (Qwen3)."""
        qkv = self._qkv(x)
        if self._norms[0] is None:
            return qkv
        *normed, values = qkv.unflatten(1, (-1, self._d)).split(self._heads, dim=1)
        parts = [
            _norm(norm, part.reshape(-1, self._d), None)[1].view_as(part)
            for norm, part in zip(self._norms, normed, strict=True)
        ]
        return torch.cat([*parts, values], dim=1).flatten(1)

    def output(self, attended: Tensor) -> Tensor:
        return self._o(attended.flatten(1))

    def mlp(self, x: Tensor) -> Tensor:
        return self.module.mlp.down_proj(silu_mul(self._gate_up(x)))


class _Joined:
    """Linear layers of one input as one matmul, over a copy of their weights. Layers with LoRA adapters are called."""

    def __init__(self, *modules: nn.Module) -> None:
        self.modules = modules
        self.plain = all(type(module) is nn.Linear for module in modules)
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def outputs(self, size: int) -> list[int]:
        """Outputs of each layer, in pieces of `size`."""
        return [module.out_features // size for module in self.modules]

    def refresh(self) -> None:
        if not self.plain:
            return
        weights = [module.weight for module in self.modules]
        biases = [module.bias for module in self.modules if module.bias is not None]
        if self.weight is None:
            self.weight = torch.cat(weights)
            self.bias = torch.cat(biases) if biases else None
            return
        torch.cat(weights, out=self.weight)  # at the same address, which graphs have captured
        if biases:
            torch.cat(biases, out=self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        if not self.plain:
            return torch.cat([module(x) for module in self.modules], dim=-1)
        return linear(x, self.weight, self.bias)
