"""Useful floating-point operations of scoring and training, from the model's configuration.

Useful: every prompt and image once for its group, every completion once, only completion tokens at the head, no
recomputation. A matmul of [n, a] x [a, b] is 2nab. Norms, rotations and softmax are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig

from vtfast.model.policy import Policy


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs by part. The backward of a trained part is twice its forward."""

    trunk: float
    attention: float
    head: float
    vision: float

    @property
    def total(self) -> float:
        return self.trunk + self.attention + self.head + self.vision

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.trunk + other.trunk,
            self.attention + other.attention,
            self.head + other.head,
            self.vision + other.vision,
        )


def forward_flops(
    config: PreTrainedConfig, prompt: int, completions: Sequence[int], patches: Sequence[int] = ()
) -> Flops:
    """One group: a prompt of `prompt` tokens, completions of these lengths, images of these numbers of patches."""
    text = getattr(config, "text_config", config)
    D, layers = text.hidden_size, text.num_hidden_layers
    head_dim = getattr(text, "head_dim", None) or D // text.num_attention_heads
    width, key_width = head_dim * text.num_attention_heads, head_dim * text.num_key_value_heads
    layer = 2 * D * width + 2 * D * key_width + 3 * D * text.intermediate_size  # weights
    tokens = prompt + sum(completions)
    pairs = prompt * (prompt + 1) / 2 + sum(n * prompt + n * (n + 1) / 2 for n in completions)
    return Flops(
        trunk=2.0 * tokens * layers * layer,
        attention=4.0 * pairs * layers * width,
        head=2.0 * sum(completions) * D * text.vocab_size,
        vision=sum(_tower_flops(config.vision_config, n) for n in patches),
    )


def _tower_flops(vision: PreTrainedConfig, n: int) -> float:
    """One image of n patches."""
    windows = getattr(vision, "window_size", None)  # Qwen2.5-VL's
    E = vision.hidden_size if windows else vision.embed_dim
    out = vision.out_hidden_size if windows else vision.hidden_size
    mlp = 3 * E * vision.intermediate_size if windows else 2 * E * int(E * vision.mlp_ratio)
    patch_width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    merged = E * vision.spatial_merge_size**2
    merger = (merged * merged + merged * out) / vision.spatial_merge_size**2
    whole = len(vision.fullatt_block_indexes) if windows else vision.depth
    seen = min(n, (windows // vision.patch_size) ** 2) if windows else n
    keys = whole * n + (vision.depth - whole) * seen  # over all blocks
    return 2.0 * n * (patch_width * E + vision.depth * (4 * E * E + mlp) + merger) + 4.0 * n * keys * E


def part_update_flops(
    policy: Policy, prompt: int, lengths: Sequence[int], patches: Sequence[int], vision_cached: bool
) -> float:
    """Of `update_flops`, one prompt with some of its completions. The policy's weights are not looked at, only their
    names, sizes and which are trained."""
    trunk, head = forward_multiples(policy)
    vision = 3 if not policy.vision_is_frozen else 0 if vision_cached else 1
    flops = forward_flops(policy.module.config, prompt, lengths, patches)
    return trunk * flops.trunk + 3 * flops.attention + head * flops.head + vision * flops.vision


def forward_multiples(policy: Policy) -> tuple[int, int]:
    """Forwards that trunk and head count for."""

    def factor(part: nn.Module) -> int:
        weights = (p for name, p in part.named_parameters() if "lora_" not in name)
        return 3 if any(p.requires_grad for p in weights) else 2

    return factor(policy.language_model.layers), factor(policy.module.lm_head)
