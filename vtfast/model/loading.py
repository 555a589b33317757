"""Model folder or hub id -> Policy."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2ForCausalLM,
    Qwen2VLForConditionalGeneration,
    Qwen3ForCausalLM,
)

from vtfast.model.attention import choose_backend
from vtfast.model.folder import base_of, check_folder, check_size, is_adapter
from vtfast.model.policy import Policy, freeze_parts
from vtfast.utils.errors import UserError
from vtfast.utils.hub import model_path
from vtfast.utils.text import first_line

log = logging.getLogger("vtfast")

DTYPES = ("float32", "bfloat16", "float16")
FAMILIES: dict[str, type[PreTrainedModel]] = {
    "qwen2_vl": Qwen2VLForConditionalGeneration,
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen2": Qwen2ForCausalLM,  # and Qwen2.5
    "qwen3": Qwen3ForCausalLM,
}
"""By `model_type` of a checkpoint's config.json."""


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
    one of `vtfast.model.attention.BACKENDS`.

    Raises UserError when the folder has no weights, the id cannot be fetched, or the model is of another family.
    """
    weights_dtype = dtype_named(dtype, torch.device(device).type)
    folder = Path(model_path(path))
    base = full_model(folder)
    # A stranger's values meet transformers' code: anything may come of it.
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"--model {path}: config.json: {first_line(error)}") from None
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
        raise UserError(f"--model {path}: cannot be loaded ({first_line(error)})") from None
    if missing:
        raise UserError(f"--model {path}: weights are missing, among them {', '.join(missing[:3])}")
    eos = module.generation_config.eos_token_id
    eos_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    backend = choose_backend(attn_implementation, device, weights_dtype)
    policy = Policy(module.to(device).eval(), eos_ids, backend)
    freeze_parts(policy, [freeze] if isinstance(freeze, str) else freeze)
    return policy


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
