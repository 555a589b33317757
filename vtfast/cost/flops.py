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
from vtfast.model.text_shape import text_shape


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs by part. The backward of a trained part is twice its forward."""

    decoder: float
    """Matmuls with the weights of the language model's layers."""
    attention: float
    head: float
    vision: float

    @property
    def total(self) -> float:
        return self.decoder + self.attention + self.head + self.vision


def forward_flops(
    config: PreTrainedConfig, prompt: int, completions: Sequence[int], patches: Sequence[int] = ()
) -> Flops:
    """One group: a prompt of `prompt` tokens, completions of these lengths, images of these numbers of patches."""
    shape = text_shape(config)
    D, layers, width = shape.hidden_size, shape.layers, shape.query_width
    layer_weights = 2 * D * width + 2 * D * shape.kv_width + 3 * D * shape.intermediate_size
    tokens = prompt + sum(completions)
    pairs = prompt * (prompt + 1) / 2 + sum(n * prompt + n * (n + 1) / 2 for n in completions)
    return Flops(
        decoder=2.0 * tokens * layers * layer_weights,
        attention=4.0 * pairs * layers * width,
        head=2.0 * sum(completions) * D * shape.vocab_size,
        vision=sum(_vision_flops(config.vision_config, n) for n in patches),
    )


def _vision_flops(vision: PreTrainedConfig, n: int) -> float:
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
    """Forward and backward of one prompt with some of its completions. Reads only the names and sizes of the policy's
    weights and which are trained, so the policy may be on the meta device.

    `vision_cached`: the output of a frozen vision encoder is there already, from the rollout."""
    decoder, head = forward_multiples(policy)
    vision = 3 if not policy.vision_is_frozen else 0 if vision_cached else 1
    flops = forward_flops(policy.module.config, prompt, lengths, patches)
    return decoder * flops.decoder + 3 * flops.attention + head * flops.head + vision * flops.vision


def forward_multiples(policy: Policy) -> tuple[int, int]:
    """FLOPs of an update in forwards, for the decoder's layers and the head: 3 if trained (the backward is twice the
    forward), else 2, since gradients pass through."""

    def multiple(part: nn.Module) -> int:
        weights = (p for name, p in part.named_parameters() if "lora_" not in name)
        return 3 if any(p.requires_grad for p in weights) else 2

    return multiple(policy.language_model.layers), multiple(policy.module.lm_head)
