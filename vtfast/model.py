"""The policy: a Hugging Face model, and the few ways in which the trainer and the rollout enter it.

Families: Qwen2-VL and Qwen2.5-VL, and the text models Qwen2, Qwen2.5 and Qwen3 (dense).

Token ids never decide what is an image: embeddings are built here from a prompt's own placeholders, so a completion
that happens to contain `<|image_pad|>` (a model at temperature 1 can sample it) is text like any other.
"""

from __future__ import annotations

import contextlib
import logging
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2ForCausalLM,
    Qwen2VLForConditionalGeneration,
    Qwen3ForCausalLM,
)

from vtfast.attention import LANGUAGE, VISION, Layout, TowerLayouts, choose_backend
from vtfast.config import FREEZABLE
from vtfast.errors import UserError
from vtfast.hub import model_path
from vtfast.model_folder import base_of, check_folder, check_size, is_adapter
from vtfast.packing import Completions, Pack
from vtfast.processor import Prompt
from vtfast.tiny_model import build_tiny_model

log = logging.getLogger("vtfast")
__all__ = ["Policy", "build_tiny_model", "load_model"]

DTYPES = ("float32", "bfloat16", "float16")
FAMILIES: dict[str, type[PreTrainedModel]] = {
    "qwen2_vl": Qwen2VLForConditionalGeneration,
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen2": Qwen2ForCausalLM,  # and Qwen2.5
    "qwen3": Qwen3ForCausalLM,
}
"""By `model_type` of a checkpoint's config.json."""


def layer_types(text: PreTrainedConfig) -> set[str]:
    """Kinds of attention among the layers. Some families' configurations name none, and have one."""
    only = "sliding_attention" if getattr(text, "sliding_window", None) else "full_attention"
    return set(getattr(text, "layer_types", None) or [only])


class ImageMemory:
    """What a frozen vision tower made of each prompt's images, while `open`: rollout, reference and updates of a step
    then run it once. A tower that is trained is never remembered."""

    def __init__(self) -> None:
        self.features: dict[Prompt, Tensor] | None = None

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        self.features = {}
        try:
            yield
        finally:
            self.features = None


@dataclass
class Policy:
    """A model with its end-of-sequence ids. D hidden size, V vocabulary, P prompt tokens, T packed tokens."""

    module: PreTrainedModel
    eos_ids: tuple[int, ...]
    backend: str = "sdpa"
    """Attention kernel of packed rows (`vtfast.attention.BACKENDS`)."""
    images: ImageMemory = field(default_factory=ImageMemory)

    def __post_init__(self) -> None:
        if self.visual is not None and self.device.type == "cuda":
            patches = (
                self.visual.patch_embed
            )  # a bound method, so that copies of the module get their own
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

    def trunk(
        self, pack: Pack, store: Callable[[int, Tensor, Tensor], None] | None = None
    ) -> Tensor:
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
        return (
            torch.empty_like(tokens).index_copy_(0, index.to(hidden.device), tokens).flatten(0, 1)
        )

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


def dtype_named(name: str, kind: str) -> torch.dtype:
    """A weight's type by its name, or auto: bfloat16 on CUDA, else float32. `kind`: of device, as torch names it."""
    name = str(name).removeprefix("torch.")
    if name == "auto":
        name = "bfloat16" if kind == "cuda" else "float32"
    if name not in DTYPES:
        raise UserError(f"dtype {name}: must be one of {', '.join(DTYPES)}")
    return getattr(torch, name)


def load_model(
    path: str | Path,
    dtype: str = "float32",
    device: str = "cpu",
    freeze: Sequence[str] = (),
    attn_implementation: str = "auto",
) -> Policy:
    """Load a checkpoint of one of FAMILIES (folder or hub id); LoRA adapters that it holds are merged into the weights.

    `dtype`: a name, or auto: bfloat16 on CUDA, else float32.
    `freeze`: any of vision (the tower), merger (its projection into the language model), language (all of the language
    model, embeddings and head included), embeddings (these alone). `attn_implementation`: of packed rows, auto or
    one of `vtfast.attention.BACKENDS`.

    Raises UserError when the folder has no weights, the id cannot be fetched, or the model is of another family.
    """
    weights_dtype = dtype_named(dtype, torch.device(device).type)
    folder = Path(model_path(path))
    base = full_model(folder)
    # A stranger's values meet transformers' code: anything may come of it.
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"--model {path}: config.json: {_first_line(error)}") from None
    if config.model_type not in FAMILIES:
        raise UserError(
            f"--model {path}: is a {config.model_type} model; those of {', '.join(FAMILIES)} can be trained"
        )
    family = FAMILIES[config.model_type]
    if Path(base).is_dir():
        check_size(family, config, Path(base))
    try:
        module, missing = _from_pretrained(family, base, weights_dtype)
        if base != str(folder):
            adapted, _ = _from_pretrained(family, str(folder), weights_dtype)
            module.load_state_dict(merged_weights(adapted))
    except Exception as error:
        raise UserError(f"--model {path}: cannot be loaded ({_first_line(error)})") from None
    if missing:
        raise UserError(f"--model {path}: weights are missing, among them {', '.join(missing[:3])}")
    eos = module.generation_config.eos_token_id
    eos_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    backend = choose_backend(attn_implementation, device, weights_dtype)
    policy = Policy(module.to(device).eval(), eos_ids, backend)
    freeze_parts(policy, [freeze] if isinstance(freeze, str) else freeze)
    return policy


def embed_patches(self: nn.Module, patches: Tensor) -> Tensor:
    """In place of `forward` of a tower's patch embedding: [K, values of a patch] -> [K, E].

    Its 3-D convolution has one position a patch, so it is a matmul, and libraries that do not see that take several
    times as long. Not on the CPU, where the convolution is a small part and, unlike MKL's matmul, rounds a patch alike
    whatever its batch."""
    weight = self.proj.weight.flatten(1)
    return linear(patches.view(-1, weight.shape[1]).to(weight.dtype), weight, self.proj.bias)


def full_model(folder: Path) -> str:
    """The folder itself, or the base model that its LoRA adapters name, said aloud: another model than the user named
    is read then. Both hold nothing but weights."""
    if not folder.is_dir():
        return str(folder)  # a hub id
    check_folder(folder)
    if not is_adapter(folder):
        return str(folder)
    base = model_path(base_of(folder))
    log.info("%s holds LoRA adapters; the base model that they name is loaded: %s", folder, base)
    if Path(base).is_dir():
        check_folder(Path(base))
    return base


def _from_pretrained(
    family: type[PreTrainedModel], folder: str, dtype: torch.dtype
) -> tuple[PreTrainedModel, list[str]]:
    """-> model, names of weights that the folder lacks."""
    module, report = family.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation="sdpa",
        output_loading_info=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    return module, sorted(report["missing_keys"])


def merged_weights(module: nn.Module) -> dict[str, Tensor]:
    """State dict of an ordinary model, every LoRA adapter of `module` added to the weight beside it.

    They go into a model of their own: one that has held adapters is saved by transformers as if it still did.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer  # installed: transformers has loaded them

    for name, layer in list(module.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, layer.get_base_layer())
    return module.state_dict()


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


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
