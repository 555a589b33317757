"""The policy: a Hugging Face model, and the few ways in which the trainer and the rollout enter it.

Families: Qwen2-VL and Qwen2.5-VL, and the text models Qwen2, Qwen2.5 and Qwen3 (dense).

Token ids never decide what is an image: embeddings are built here from a prompt's own placeholders, so a completion
that happens to contain `<|image_pad|>` (a model at temperature 1 can sample it) is text like any other.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from vtfast.config import FREEZABLE
from vtfast.data.prompt import Prompt
from vtfast.model.attention import LANGUAGE, VISION, Layout, TowerLayouts
from vtfast.model.packing import Completions, Pack
from vtfast.model.vision import ImageMemory, embed_patches
from vtfast.utils.errors import UserError


def layer_types(text: PreTrainedConfig) -> set[str]:
    """Kinds of attention among the layers. Some families' configurations name none, and have one."""
    only = "sliding_attention" if getattr(text, "sliding_window", None) else "full_attention"
    return set(getattr(text, "layer_types", None) or [only])


@dataclass
class Policy:
    """A model with its end-of-sequence ids. D hidden size, V vocabulary, P prompt tokens, T packed tokens."""

    module: PreTrainedModel
    eos_ids: tuple[int, ...]
    backend: str = "sdpa"
    """Attention kernel of packed rows (`vtfast.model.attention.BACKENDS`)."""
    images: ImageMemory = field(default_factory=ImageMemory)

    def __post_init__(self) -> None:
        if self.visual is not None and self.device.type == "cuda":
            patches = self.visual.patch_embed  # a bound method, so that copies of the module get their own
            patches.forward = types.MethodType(embed_patches, patches)

    @property
    def device(self) -> torch.device:
        return self.module.lm_head.weight.device

    @property
    def head(self) -> Tensor:
        """The output projection [V, D]; the embedding itself where the two are tied."""
        return self.module.lm_head.weight

    @property
    def language_model(self) -> nn.Module:
        return self.module.model if self.visual is None else self.module.model.language_model

    @property
    def visual(self) -> nn.Module | None:
        """The vision tower with its merger; None for a text model."""
        return getattr(self.module.model, "visual", None)

    @property
    def tower_is_frozen(self) -> bool:
        parts = () if self.visual is None else (self.visual.patch_embed, self.visual.blocks)
        return not any(p.requires_grad for part in parts for p in part.parameters())

    @property
    def reorders_patches(self) -> bool:
        """Whether the tower works on patches in an order of its own (Qwen2.5-VL's windows)."""
        return hasattr(self.visual, "fullatt_block_indexes")

    def pack(self, prompts: Sequence[Prompt], completions: Completions) -> Pack:
        return Pack(prompts, completions, backend=self.backend, device=self.device)

    def trunk(self, pack: Pack, store: Callable[[int, Tensor, Tensor], None] | None = None) -> Tensor:
        """Hidden states of a packed row [T, D], behind the last norm. `store(layer, keys, values)` is given each
        layer's rotated keys and values [T, K, d]."""
        # Whatever `set_attn_implementation` chose would not know the layout, and let completions see each other.
        self.language_model.config._attn_implementation = LANGUAGE
        embedding = self.embed(pack.ids)
        features = [f for f in self.image_features(pack.prompts) if f is not None]
        if features:
            features = torch.cat(features).to(embedding.dtype)
            embedding = embedding.index_copy(0, pack.image_index, features)
        elif torch.is_grad_enabled() and self.visual is not None:
            embedding = embedding + self._zero_of_the_tower()
        # A family whose layers may differ takes a mask for each kind; the others make none for an attention like ours.
        kinds = getattr(self.language_model.config, "layer_types", None)
        output = self.language_model(
            inputs_embeds=embedding[None],
            position_ids=pack.positions if self.visual is not None else pack.positions[0],
            attention_mask=dict.fromkeys(kinds) if kinds else None,
            use_cache=False,
            layout=pack.layout,
            store=store,
        )
        return output.last_hidden_state[0]

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings; every id is text here, `<|image_pad|>` included."""
        return self.language_model.embed_tokens(ids)

    def image_features(self, prompts: Sequence[Prompt]) -> list[Tensor | None]:
        """One [image tokens, D] tensor per prompt (None without images); one call of the vision tower for all."""
        with_images = [prompt for prompt in prompts if prompt.pixels is not None]
        if not with_images:
            return [None] * len(prompts)
        if self.images.features is None or not self.tower_is_frozen:
            merged = self._tower(with_images).pooler_output
        else:
            merged = self._remembered(with_images, self.images.features)
        parts = iter(merged.split([int(prompt.image_mask.sum()) for prompt in with_images]))
        return [None if prompt.pixels is None else next(parts) for prompt in prompts]

    def _remembered(self, prompts: Sequence[Prompt], memory: dict[Prompt, Tensor]) -> Tensor:
        """[image tokens of all prompts, D]; the tower runs over those images only that `memory` does not hold. The
        merger, which may be trained, runs over all."""
        unseen = [prompt for prompt in dict.fromkeys(prompts) if prompt not in memory]
        if unseen:
            with torch.no_grad():
                hidden = self._tower(unseen).last_hidden_state
            if self.reorders_patches:
                hidden = self._in_order(hidden, torch.cat([prompt.grid for prompt in unseen]))
            patches = hidden.split([len(prompt.pixels) for prompt in unseen])
            memory.update(zip(unseen, patches, strict=True))
        return self.visual.merger(torch.cat([memory[prompt] for prompt in prompts]))

    def _in_order(self, hidden: Tensor, grid: Tensor) -> Tensor:
        """A tower's patches [K, E], which lie window by window, as their images have them. The patches of a merged
        token stay together in both orders."""
        from transformers.vision_utils import get_vision_window_index

        visual = self.visual
        sizes = visual.spatial_merge_size, visual.window_size, visual.patch_size
        index, _ = get_vision_window_index(grid, *sizes)
        tokens = hidden.unflatten(0, (-1, visual.spatial_merge_unit))
        return torch.empty_like(tokens).index_copy_(0, index.to(hidden.device), tokens).flatten(0, 1)

    def _tower(self, prompts: Sequence[Prompt]):
        pixels = torch.cat([prompt.pixels for prompt in prompts])
        grid = torch.cat([prompt.grid for prompt in prompts])
        self.visual.config._attn_implementation = VISION
        pixels = pixels.to(self.device, self.visual.dtype)
        return self.visual(pixels, grid_thw=grid.to(self.device), layout=self._tower_layout(grid))

    def _tower_layout(self, grid: Tensor) -> Layout | TowerLayouts:
        if self.reorders_patches:
            return TowerLayouts(self.backend, self.device)
        patches = grid.prod(-1).tolist()
        return Layout(patches, causal=False, backend=self.backend, device=self.device)

    def _zero_of_the_tower(self) -> Tensor:
        """Zero, with a gradient of zero for every trained weight of the tower. A row without images adds it where
        others put their images: ranks reduce gradients as they arrive, so all need the same ones in the same order."""
        if not any(p.requires_grad for p in self.visual.parameters()):
            return torch.zeros((), device=self.device, dtype=self.head.dtype)
        side = self.visual.spatial_merge_size
        width = self.visual.patch_embed.proj.weight[0].numel()
        pixels = torch.zeros(side * side, width, device=self.device, dtype=self.visual.dtype)
        grid = torch.tensor([[1, side, side]], device=self.device)
        self.visual.config._attn_implementation = VISION
        made = self.visual(pixels, grid_thw=grid, layout=self._tower_layout(grid))
        return 0.0 * made.pooler_output.sum()


def freeze_parts(policy: Policy, parts: Sequence[str]) -> None:
    """Raises UserError for a part that the model has not."""
    language, visual = policy.language_model, policy.visual
    members = {
        "language": [language, policy.module.lm_head],
        "embeddings": [language.embed_tokens, policy.module.lm_head],
    }
    if visual is not None:
        members |= {"vision": [visual.patch_embed, visual.blocks], "merger": [visual.merger]}
    for part in parts:
        if part not in FREEZABLE:
            raise UserError(f"--freeze {part}: must be among {', '.join(FREEZABLE)}")
        if part not in members:
            raise UserError(f"--freeze {part}: a text model has none")
        for member in members[part]:
            member.requires_grad_(False)
