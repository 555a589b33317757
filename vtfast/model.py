"""The policy: a Hugging Face Qwen2-VL, and the few ways in which the trainer and the rollout enter it.

Token ids never decide what is an image: embeddings are built here from a prompt's own placeholders, so a completion
that happens to contain `<|image_pad|>` (a model at temperature 1 can sample it) is text like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, Qwen2VLForConditionalGeneration

from vtfast.config import FREEZABLE
from vtfast.errors import UserError
from vtfast.hub import model_path
from vtfast.processor import Prompt
from vtfast.tiny_model import build_tiny_model

__all__ = ["Policy", "build_tiny_model", "load_model"]


@dataclass
class Policy:
    """A model with its end-of-sequence ids. D = hidden size, V = vocabulary size, P = prompt tokens."""

    module: Qwen2VLForConditionalGeneration
    eos_ids: tuple[int, ...]

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

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings; every id is text here, `<|image_pad|>` included."""
        return self.language_model.embed_tokens(ids)

    def image_features(self, prompts: Sequence[Prompt]) -> list[Tensor | None]:
        """One [image tokens, D] tensor per prompt (None without images); one call of the vision tower for all."""
        with_images = [prompt for prompt in prompts if prompt.pixels is not None]
        if not with_images:
            return [None] * len(prompts)
        visual = self.module.model.visual
        pixels = torch.cat([prompt.pixels for prompt in with_images])
        grid = torch.cat([prompt.grid for prompt in with_images])
        features = visual(pixels.to(self.device, visual.dtype), grid_thw=grid.to(self.device))
        counts = [int(prompt.image_mask.sum()) for prompt in with_images]
        parts = iter(features.pooler_output.split(counts))
        return [None if prompt.pixels is None else next(parts) for prompt in prompts]

    def embed_prompts(self, prompts: Sequence[Prompt]) -> list[Tensor]:
        """Input embeddings [P, D] of each prompt, image features in the places of its placeholders."""
        embeddings = []
        for prompt, features in zip(prompts, self.image_features(prompts), strict=True):
            embedding = self.embed(prompt.ids.to(self.device))
            if features is not None:
                mask = prompt.image_mask.to(self.device)[:, None]
                embedding = embedding.masked_scatter(mask, features.to(embedding.dtype))
            embeddings.append(embedding)
        return embeddings


def load_model(
    path: str | Path,
    dtype: str = "float32",
    device: str = "cpu",
    freeze: Sequence[str] = (),
) -> Policy:
    """Load a Qwen2-VL checkpoint (folder or hub id). `freeze`: any of vision, merger, language, embeddings.

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
    try:
        family = AutoConfig.from_pretrained(str(folder)).model_type
        if family != "qwen2_vl":
            raise UserError(f"--model {path}: is a {family} model; only qwen2_vl can be trained")
        module, report = Qwen2VLForConditionalGeneration.from_pretrained(
            str(folder),
            dtype=dtypes[dtype],
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--model {path}: cannot be loaded ({_first_line(error)})") from None
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(f"--model {path}: weights are missing, among them {', '.join(missing[:3])}")
    if set(module.config.text_config.layer_types) != {"full_attention"}:
        raise UserError(f"--model {path}: sliding-window attention is not supported")
    eos = module.generation_config.eos_token_id
    eos_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    policy = Policy(module.to(device).eval(), eos_ids)
    _freeze(policy, [freeze] if isinstance(freeze, str) else freeze)
    return policy


def _freeze(policy: Policy, parts: Sequence[str]) -> None:
    model = policy.module.model
    members = {
        "vision": [model.visual.patch_embed, model.visual.blocks],
        "merger": [model.visual.merger],
        "language": [model.language_model.layers, model.language_model.norm],
        "embeddings": [model.language_model.embed_tokens, policy.module.lm_head],
    }
    for part in parts:
        if part not in FREEZABLE:
            raise UserError(f"--freeze {part}: must be among {', '.join(FREEZABLE)}")
        for member in members[part]:
            member.requires_grad_(False)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
