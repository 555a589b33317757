"""The policy: a Hugging Face model and the entry points that the trainer and the rollout use.

`vtfast.model.loading.FAMILIES` lists the families.

Image positions come from the prompt's `image_mask`, not from token ids, so a completion that happens to contain
`<|image_pad|>` (a model at temperature 1 can sample it) is text like any other.

Shapes: T packed tokens, D hidden size, V vocabulary, K key-value heads, d head size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from vtfast.data.prompt import Prompt
from vtfast.model.attention import LANGUAGE_ATTENTION
from vtfast.model.packing import Completions, Pack
from vtfast.model.vision import FeatureCache, VisionEncoder
from vtfast.utils.errors import UserError


def layer_types(text: PreTrainedConfig) -> set[str]:
    """Kinds of attention among the layers. Some families' configurations list none: all layers are then of one kind."""
    only = "sliding_attention" if getattr(text, "sliding_window", None) else "full_attention"
    return set(getattr(text, "layer_types", None) or [only])


@dataclass
class Policy:
    """A model with its end-of-sequence ids."""

    module: PreTrainedModel
    eos_ids: tuple[int, ...]
    attention_backend: str = "sdpa"
    """Attention kernel of packed rows (`vtfast.model.attention.BACKENDS`)."""
    feature_cache: FeatureCache = field(default_factory=FeatureCache)
    """Image features, shared with the reference model."""
    vision: VisionEncoder | None = field(init=False)
    """Vision encoder; None for a text model."""

    def __post_init__(self) -> None:
        visual = getattr(self.module.model, "visual", None)
        self.vision = None if visual is None else VisionEncoder(visual, self.attention_backend, self.feature_cache)

    @property
    def device(self) -> torch.device:
        return self.module.lm_head.weight.device

    @property
    def head(self) -> Tensor:
        """The output projection [V, D]; the same tensor as the embedding where the two are tied."""
        return self.module.lm_head.weight

    @property
    def language_model(self) -> PreTrainedModel:
        return self.module.model if self.vision is None else self.module.model.language_model

    @property
    def vision_is_frozen(self) -> bool:
        """Whether the vision encoder is frozen; True for a text model, too."""
        return self.vision is None or self.vision.is_frozen

    def cache_image_features(self) -> contextlib.AbstractContextManager[None]:
        """Context in which a frozen vision encoder runs once per image."""
        return self.feature_cache.open()

    def pack(self, prompts: Sequence[Prompt], completions: Completions) -> Pack:
        return Pack(prompts, completions, backend=self.attention_backend, device=self.device)

    def hidden_states(self, pack: Pack, kv_callback: Callable[[int, Tensor, Tensor], None] | None = None) -> Tensor:
        """Output of the last norm [T, D]. `kv_callback(layer, keys, values)` receives each layer's rotated keys and
        values [T, K, d]."""
        language_model = self.language_model
        # Any other implementation, set by `set_attn_implementation`, would let completions see each other.
        language_model.config._attn_implementation = LANGUAGE_ATTENTION
        embedding = self.embed(pack.ids)
        features = [f for f in self.image_features(pack.prompts) if f is not None]
        if features:
            embedding = embedding.index_copy(0, pack.image_index, torch.cat(features).to(embedding.dtype))
        elif torch.is_grad_enabled() and self.vision is not None:
            embedding = embedding + self.vision.zero_through_encoder()
        # Families with several kinds of layers expect a mask for each kind; None means that the layout decides.
        kinds = getattr(language_model.config, "layer_types", None)
        output = language_model(
            inputs_embeds=embedding[None],
            position_ids=pack.positions if self.vision is not None else pack.positions[0],
            attention_mask=dict.fromkeys(kinds) if kinds else None,
            use_cache=False,
            layout=pack.layout,
            kv_callback=kv_callback,
        )
        return output.last_hidden_state[0]

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings [..., D]; every id is treated as text, `<|image_pad|>` included."""
        return self.language_model.embed_tokens(ids)

    def image_features(self, prompts: Sequence[Prompt]) -> list[Tensor | None]:
        """One [image tokens, D] tensor per prompt (None without images), in one call of the vision encoder."""
        with_images = [prompt for prompt in prompts if prompt.pixels is not None]
        if not with_images:
            return [None] * len(prompts)
        assert self.vision is not None
        tokens = [int(prompt.image_mask.sum()) for prompt in with_images if prompt.image_mask is not None]
        by_prompt = iter(self.vision.features(with_images).split(tokens))
        return [None if prompt.pixels is None else next(by_prompt) for prompt in prompts]


def freeze_parts(policy: Policy, parts: Sequence[str]) -> None:
    """Turn off gradients of the named parts. Raises UserError for a part that the model does not have."""
    language, vision = policy.language_model, policy.vision
    members = {
        "language": [language, policy.module.lm_head],
        "embeddings": [language.embed_tokens, policy.module.lm_head],
    }
    if vision is not None:
        members |= {"vision": [vision.module.patch_embed, vision.module.blocks], "merger": [vision.module.merger]}
    for part in parts:
        if part not in members:
            raise UserError(f"--freeze {part}: must be among the parts of this model: {', '.join(members)}")
        for member in members[part]:
            member.requires_grad_(False)
