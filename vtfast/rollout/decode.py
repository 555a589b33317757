"""One token for every row: the language model's layers over the paged cache, with Hugging Face's own weights.

M-RoPE in decode: all three axes stand at the cache length + the row's own delta (a prompt with images ends at a smaller
angle than its number of tokens), while the slot in the cache is the cache length. The two are never mixed.

Shapes: R rows, D hidden size, H query heads, K key heads, d head size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from vtfast_kernels.paged_attention import Pages, paged_attention

from vtfast.model import Policy
from vtfast.rollout.cache import PagedCache


@dataclass
class Rows:
    """State of the rows that are being written, on the device. Row r is row r of every tensor."""

    token: Tensor
    """[R] the newest token, not in the cache yet."""
    length: Tensor
    """[R] tokens in the cache."""
    delta: Tensor
    """[R] M-RoPE angle of the next token minus its place in the sequence."""
    table: Tensor
    """[R, pages] int32, pages in order; 0 where there is none."""
    group: Tensor
    """[R] rows of a prompt share a number; non-decreasing."""
    shared: Tensor
    """[R] leading pages that belong to the whole group."""
    key: Tensor
    """[R] key of the row's randomness."""
    emitted: Tensor
    """[R] tokens written so far."""
    index: Tensor
    """[R] where the row's output goes."""
    active: Tensor
    """[R] bool; a finished row runs along until rows are compacted."""

    def take(self, rows: Tensor) -> Rows:
        return Rows(**{name: value[rows] for name, value in vars(self).items()})

    @staticmethod
    def join(first: Rows, second: Rows) -> Rows:
        return Rows(**{n: torch.cat([value, vars(second)[n]]) for n, value in vars(first).items()})


class Decoder:
    """`step(rows) -> hidden [R, D]`. Made anew for every rollout, so that it sees the weights as they are then."""

    def __init__(self, policy: Policy, cache: PagedCache, longest: int) -> None:
        """`longest`: most positions that a row can reach; their rotations are tabulated."""
        self.policy, self.cache = policy, cache
        model = policy.language_model
        self.layers = [_Layer(layer) for layer in model.layers]
        positions = torch.arange(longest, device=policy.device).expand(3, 1, -1)
        cos, sin = model.rotary_emb(policy.head[:1], positions)
        self.cos, self.sin = cos[0, :, None], sin[0, :, None]  # [longest, 1, d]

    def step(self, rows: Rows) -> Tensor:
        page = self.cache.page
        x = self.policy.embed(rows.token)
        angle = rows.length + rows.delta
        cos, sin = self.cos[angle], self.sin[angle]
        pages = rows.table.gather(1, (rows.length // page)[:, None])[:, 0]
        slot = pages.long() * page + rows.length % page
        seen = Pages(rows.table, rows.length + 1, rows.group, rows.shared, page)
        for number, layer in enumerate(self.layers):
            keys, values = self.cache.keys[number], self.cache.values[number]
            qk, v = layer.project(x)
            q, k = _rotate(qk, cos, sin).split(layer.heads[:2], dim=1)
            keys.flatten(0, 1).index_copy_(0, slot, k)
            values.flatten(0, 1).index_copy_(0, slot, v)
            attended = paged_attention(q, keys, values, seen, scale=layer.attention.scaling)
            x = layer.finish(x, attended)
        return self.policy.language_model.norm(x)


class _Layer:
    """A decoder layer of Hugging Face's, with q, k and v, and gate and up, as one matmul each.

    The joined weights are copies, made once a rollout. Layers with LoRA adapters are called as they are.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.attention, self.mlp = layer, layer.self_attn, layer.mlp
        attention, mlp = self.attention, self.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.qkv = _joined(projections)
        self.gate_up = _joined((mlp.gate_proj, mlp.up_proj))
        self.projections = projections
        self.heads = attention.num_heads, attention.num_key_value_heads, attention.head_dim

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """-> queries and keys [R, H + K, d], before rotation, and values [R, K, d]."""
        x = self.layer.input_layernorm(x)
        H, K, d = self.heads
        if self.qkv is None:
            qkv = torch.cat([project(x) for project in self.projections], dim=-1)
        else:
            qkv = linear(x, *self.qkv)
        return qkv.unflatten(-1, (-1, d)).split([H + K, K], dim=1)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.attention.o_proj(attended.flatten(1))
        h = self.layer.post_attention_layernorm(x)
        if self.gate_up is None:
            return x + self.mlp(h)
        gate, up = linear(h, *self.gate_up).chunk(2, dim=-1)
        return x + self.mlp.down_proj(silu(gate) * up)


def _joined(modules: tuple[nn.Module, ...]) -> tuple[Tensor, Tensor | None] | None:
    """One weight [sum of outputs, D] and bias; None if a module is more than a linear layer."""
    if not all(type(module) is nn.Linear for module in modules):
        return None
    weight = torch.cat([module.weight for module in modules])
    has_bias = modules[0].bias is not None
    return weight, torch.cat([module.bias for module in modules]) if has_bias else None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [R, heads, d] turned by the angles of cos and sin [R, 1, d], halves against each other as in Llama."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
