"""The policy: a Hugging Face Qwen2-VL, and the few ways in which the trainer and the rollout enter it.

Token ids never decide what is an image: embeddings are built here from a prompt's own placeholders, so a completion
that happens to contain `<|image_pad|>` (a model at temperature 1 can sample it) is text like any other.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, Qwen2VLForConditionalGeneration

from vtfast.attention import LANGUAGE, VISION, Layout, choose_backend
from vtfast.config import FREEZABLE
from vtfast.errors import UserError
from vtfast.hub import model_path
from vtfast.packing import Completions, Pack
from vtfast.processor import Prompt
from vtfast.tiny_model import build_tiny_model

__all__ = ["Policy", "build_tiny_model", "load_model"]


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

    module: Qwen2VLForConditionalGeneration
    eos_ids: tuple[int, ...]
    backend: str = "sdpa"
    """Attention kernel of packed rows (`vtfast.attention.BACKENDS`)."""
    images: ImageMemory = field(default_factory=ImageMemory)

    @property
    def device(self) -> torch.device:
        return self.module.lm_head.weight.device

    @property
    def head(self) -> Tensor:
        """The output projection [V, D]; the embedding itself where the two are tied."""
        return self.module.lm_head.weight

    @property
    def language_model(self) -> nn.Module:
        return self.module.model.language_model

    @property
    def visual(self) -> nn.Module:
        return self.module.model.visual

    @property
    def tower_is_frozen(self) -> bool:
        parts = (self.visual.patch_embed, self.visual.blocks)
        return not any(p.requires_grad for part in parts for p in part.parameters())

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
        elif torch.is_grad_enabled():
            embedding = embedding + self._zero_of_the_tower()
        output = self.language_model(
            inputs_embeds=embedding[None],
            position_ids=pack.positions,
            attention_mask=dict.fromkeys(self.language_model.config.layer_types),
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
        memory = self.images.features if self.tower_is_frozen else None
        if memory is None:
            merged = self._tower(with_images).pooler_output
        else:
            unseen = [prompt for prompt in dict.fromkeys(with_images) if prompt not in memory]
            if unseen:
                with torch.no_grad():
                    hidden = self._tower(unseen).last_hidden_state
                patches = hidden.split([len(prompt.pixels) for prompt in unseen])
                memory.update(zip(unseen, patches, strict=True))
            merged = self.visual.merger(torch.cat([memory[prompt] for prompt in with_images]))
        parts = iter(merged.split([int(prompt.image_mask.sum()) for prompt in with_images]))
        return [None if prompt.pixels is None else next(parts) for prompt in prompts]

    def _tower(self, prompts: Sequence[Prompt]):
        pixels = torch.cat([prompt.pixels for prompt in prompts])
        grid = torch.cat([prompt.grid for prompt in prompts])
        patches = grid.prod(-1).tolist()
        self.visual.config._attn_implementation = VISION
        layout = Layout(patches, causal=False, backend=self.backend, device=self.device)
        pixels = pixels.to(self.device, self.visual.dtype)
        return self.visual(pixels, grid_thw=grid.to(self.device), layout=layout)

    def _zero_of_the_tower(self) -> Tensor:
        """Zero, with a gradient of zero for every trained weight of the tower. A row without images adds it where
        others put their images: ranks reduce gradients as they arrive, so all need the same ones in the same order."""
        if not any(p.requires_grad for p in self.visual.parameters()):
            return torch.zeros((), device=self.device, dtype=self.head.dtype)
        side = self.visual.spatial_merge_size
        width = self.visual.patch_embed.proj.weight[0].numel()
        pixels = torch.zeros(side * side, width, device=self.device, dtype=self.visual.dtype)
        grid = torch.tensor([[1, side, side]], device=self.device)
        layout = Layout([side * side], causal=False, backend=self.backend, device=self.device)
        return 0.0 * self.visual(pixels, grid_thw=grid, layout=layout).pooler_output.sum()


def load_model(
    path: str | Path,
    dtype: str = "float32",
    device: str = "cpu",
    freeze: Sequence[str] = (),
    attn_implementation: str = "auto",
) -> Policy:
    """Load a Qwen2-VL checkpoint (folder or hub id); LoRA adapters that it holds are merged into the weights.

    `freeze`: any of vision (the tower), merger (its projection into the language model), language (all of the language
    model, embeddings and head included), embeddings (these alone). `attn_implementation`: of packed rows, auto or
    one of `vtfast.attention.BACKENDS`.

    Raises UserError when the folder has no weights, the id cannot be fetched, or the model is of another family.
    """
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in dtypes:
        raise UserError(f"dtype {dtype}: must be one of {', '.join(dtypes)}")
    folder = Path(model_path(path))
    weights = ("*.safetensors", "*.safetensors.index.json")
    if folder.is_dir() and not any(list(folder.glob(pattern)) for pattern in weights):
        raise UserError(f"--model {path}: the folder has no *.safetensors weights")
    base = _base_of(folder)
    try:
        family = AutoConfig.from_pretrained(base).model_type
        if family == "qwen2_vl":
            module, missing = _from_pretrained(base, dtypes[dtype])
            if base != str(folder):
                adapted, _ = _from_pretrained(str(folder), dtypes[dtype])
                module.load_state_dict(merged_weights(adapted))
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(f"--model {path}: cannot be loaded ({_first_line(error)})") from None
    if family != "qwen2_vl":
        raise UserError(f"--model {path}: is a {family} model; only qwen2_vl can be trained")
    if missing:
        raise UserError(f"--model {path}: weights are missing, among them {', '.join(missing[:3])}")
    eos = module.generation_config.eos_token_id
    eos_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    backend = choose_backend(attn_implementation, device, dtypes[dtype])
    policy = Policy(module.to(device).eval(), eos_ids, backend)
    _freeze(policy, [freeze] if isinstance(freeze, str) else freeze)
    return policy


def _base_of(folder: Path) -> str:
    """The folder itself, or the base model that its LoRA adapters name."""
    adapter = folder / "adapter_config.json"
    if not adapter.is_file():
        return str(folder)
    return json.loads(adapter.read_text())["base_model_name_or_path"]


def _from_pretrained(
    folder: str, dtype: torch.dtype
) -> tuple[Qwen2VLForConditionalGeneration, list[str]]:
    """-> model, names of weights that the folder lacks."""
    module, report = Qwen2VLForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
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


def _freeze(policy: Policy, parts: Sequence[str]) -> None:
    model = policy.module.model
    members = {
        "vision": [model.visual.patch_embed, model.visual.blocks],
        "merger": [model.visual.merger],
        "language": [model.language_model, policy.module.lm_head],
        "embeddings": [model.language_model.embed_tokens, policy.module.lm_head],
    }
    for part in parts:
        if part not in FREEZABLE:
            raise UserError(f"--freeze {part}: must be among {', '.join(FREEZABLE)}")
        for member in members[part]:
            member.requires_grad_(False)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
