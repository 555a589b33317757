"""The vision encoder with its merger: images in, features of the language model's width out.

A frozen encoder need not run again for the same image: while `FeatureCache.open()` is active, its output is kept, so
the rollout, the reference model and the updates of one step share a single forward. The output of a trained encoder is
never kept.

Shapes: K patches of all images, M image tokens (K / 4 for a 2 x 2 merge), E encoder width, D hidden size.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vtfast.data.prompt import Prompt
from vtfast.model.attention import VISION_ATTENTION
from vtfast.model.attention_layout import AttentionLayout, VisionLayouts


class FeatureCache:
    """Patches [K, E] that a frozen encoder computed, by prompt. A policy and its reference model share one cache."""

    def __init__(self) -> None:
        self.patches: dict[Prompt, Tensor] | None = None
        """Encoded patches of each prompt; None outside `open()`."""

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        self.patches = {}
        try:
            yield
        finally:
            self.patches = None


class VisionEncoder:
    """Hugging Face's vision module over packed images."""

    def __init__(self, module: PreTrainedModel, backend: str, cache: FeatureCache) -> None:
        """`backend`: attention kernel, as in `attention.BACKENDS`."""
        self.module, self.backend, self.cache = module, backend, cache
        if self.device.type == "cuda":
            # A bound method, so that a deep copy of the module uses its own weights.
            module.patch_embed.forward = types.MethodType(embed_patches, module.patch_embed)

    @property
    def device(self) -> torch.device:
        return self.module.patch_embed.proj.weight.device

    @property
    def is_frozen(self) -> bool:
        """Whether nothing in front of the merger is trained."""
        parts = self.module.patch_embed, self.module.blocks
        return not any(p.requires_grad for part in parts for p in part.parameters())

    @property
    def uses_windows(self) -> bool:
        """Whether the encoder reorders patches into attention windows (Qwen2.5-VL)."""
        return hasattr(self.module, "fullatt_block_indexes")

    def features(self, prompts: Sequence[Prompt]) -> Tensor:
        """Features [M, D] of all images of `prompts`, each of which has at least one."""
        if self.cache.patches is None or not self.is_frozen:
            return self.encode(prompts).pooler_output
        return self._cached_features(prompts, self.cache.patches)

    def _cached_features(self, prompts: Sequence[Prompt], cache: dict[Prompt, Tensor]) -> Tensor:
        """[M, D]. Images missing from `cache` are encoded; the merger, which may be trained, runs on all."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in cache]
        if missing:
            with torch.no_grad():
                hidden = self.encode(missing).last_hidden_state
            if self.uses_windows:
                hidden = self._undo_window_order(hidden, torch.cat([_grid(prompt) for prompt in missing]))
            patches = hidden.split([len(_pixels(prompt)) for prompt in missing])
            cache.update(zip(missing, patches, strict=True))
        return self.module.merger(torch.cat([cache[prompt] for prompt in prompts]))

    def _undo_window_order(self, hidden: Tensor, grid: Tensor) -> Tensor:
        """Patches [K, E] from window order back to image order. The patches of a merged token stay together in both."""
        from transformers.vision_utils import get_vision_window_index

        module = self.module
        index, _ = get_vision_window_index(grid, module.spatial_merge_size, module.window_size, module.patch_size)
        tokens = hidden.unflatten(0, (-1, module.spatial_merge_unit))
        return torch.empty_like(tokens).index_copy_(0, index.to(hidden.device), tokens).flatten(0, 1)

    def encode(self, prompts: Sequence[Prompt]) -> BaseModelOutputWithPooling:
        """transformers' output for the images of `prompts` in one call: `last_hidden_state` [K, E] before the merger,
        `pooler_output` [M, D] behind it."""
        pixels = torch.cat([_pixels(prompt) for prompt in prompts])
        return self._forward(pixels, torch.cat([_grid(prompt) for prompt in prompts]))

    def zero_through_encoder(self) -> Tensor:
        """A zero, 0-d, whose gradient for every trained weight of the encoder is zero.

        Added on rows without images, so that every rank produces the same gradients in the same order; ZeRO-2 reduces
        them during the backward pass."""
        module = self.module
        if not any(p.requires_grad for p in module.parameters()):
            return torch.zeros((), device=self.device, dtype=module.dtype)
        side = module.spatial_merge_size
        pixels = torch.zeros(side * side, module.patch_embed.proj.weight[0].numel())
        output = self._forward(pixels, torch.tensor([[1, side, side]]))
        return 0.0 * output.pooler_output.sum()

    def _forward(self, pixels: Tensor, grid: Tensor) -> BaseModelOutputWithPooling:
        """pixels [K, values of a patch], grid [images, 3] of frames, rows and columns of patches; both on the CPU."""
        self.module.config._attn_implementation = VISION_ATTENTION
        return self.module(
            pixels.to(self.device, self.module.dtype), grid_thw=grid.to(self.device), layout=self._layout(grid)
        )

    def _layout(self, grid: Tensor) -> AttentionLayout | VisionLayouts:
        if self.uses_windows:
            return VisionLayouts(self.backend, self.device)
        return AttentionLayout(grid.prod(-1).tolist(), causal=False, backend=self.backend, device=self.device)


def _pixels(prompt: Prompt) -> Tensor:
    assert prompt.pixels is not None
    return prompt.pixels


def _grid(prompt: Prompt) -> Tensor:
    assert prompt.grid is not None
    return prompt.grid


def embed_patches(self: nn.Module, patches: Tensor) -> Tensor:
    """Replaces `forward` of the patch embedding: [K, values of a patch] -> [K, E].

    The 3-D convolution has one position per patch, so it is a matmul, and libraries that do not notice take several
    times as long. Used on CUDA only: on the CPU the convolution is a small part of the time and, unlike MKL's matmul,
    rounds a patch the same in every batch."""
    proj = self.proj
    assert isinstance(proj, nn.Conv3d)
    weight = proj.weight.flatten(1)
    return linear(patches.view(-1, weight.shape[1]).to(weight.dtype), weight, proj.bias)
