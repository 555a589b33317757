"""Model folder or hub id -> Policy."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2ForCausalLM,
    Qwen2VLForConditionalGeneration,
    Qwen3ForCausalLM,
)

from vtfast.model.attention import choose_backend
from vtfast.model.folder_checks import base_model_of, check_config, check_folder, check_size, is_adapter
from vtfast.model.policy import Policy, freeze_parts, layer_types
from vtfast.utils.errors import UserError, user_error
from vtfast.utils.hub import model_path

log = logging.getLogger("vtfast")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FAMILIES: dict[str, type[PreTrainedModel]] = {
    "qwen2_vl": Qwen2VLForConditionalGeneration,
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen2": Qwen2ForCausalLM,  # and Qwen2.5
    "qwen3": Qwen3ForCausalLM,
}
"""By `model_type` of a checkpoint's config.json."""


def load_model(
    path: str | Path,
    dtype: str = "float32",
    device: str = "cpu",
    freeze: Sequence[str] = (),
    attn_implementation: str = "auto",
) -> Policy:
    """Load a checkpoint of one of FAMILIES (folder or hub id); LoRA adapters that it holds are merged into the weights.

    `dtype`: float32, bfloat16, or auto: bfloat16 on CUDA, else float32.
    `freeze`: any of vision (the encoder), merger (its projection into the language model), language (all of the
    language model, embeddings and head included), embeddings (these alone). `attn_implementation`: kernel for packed
    rows, auto or one of `vtfast.model.attention.BACKENDS`.

    Raises UserError when the folder has no weights, the id cannot be fetched, or the model is of another family.
    """
    torch_dtype = parse_dtype(dtype, torch.device(device).type)
    folder = model_path(path)
    check_folder(Path(folder))
    base = _base_model(folder)
    if base != folder:  # logged, since the base is a model that the user did not name
        log.info("%s holds LoRA adapters; their base model is loaded: %s", folder, base)
        check_folder(Path(base))
    family, config = _family_and_config(base, path)
    if Path(base).is_dir():
        check_size(family, config, Path(base))
    with user_error(f"--model {path}: cannot be loaded"):
        module, missing = _from_pretrained(family, base, torch_dtype)
        if base != folder:
            adapted, _ = _from_pretrained(family, folder, torch_dtype)
            module.load_state_dict(merge_adapters(adapted))
    if missing:
        raise UserError(f"--model {path}: weights are missing, among them {', '.join(missing[:3])}")
    eos = module.generation_config.eos_token_id
    eos_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    backend = choose_backend(attn_implementation, device, torch_dtype)
    policy = Policy(module.to(device).eval(), eos_ids, backend)
    freeze_parts(policy, [freeze] if isinstance(freeze, str) else freeze)
    return policy


def parse_dtype(name: str | torch.dtype, device_type: str) -> torch.dtype:
    """The dtype of this name; auto is bfloat16 on CUDA, else float32. `device_type`: cpu or cuda."""
    name = str(name).removeprefix("torch.")
    if name == "auto":
        name = "bfloat16" if device_type == "cuda" else "float32"
    return DTYPES[name]


def read_model_config(path: str | Path) -> PreTrainedConfig:
    """The config.json of a folder or hub id; for a folder with LoRA adapters that of their base model.

    Raises UserError if there is none, it cannot be read, or its family or its attention is not supported.
    """
    folder = _base_model(model_path(path))
    if (Path(folder) / "config.json").is_file():
        check_config(Path(folder))
    _, config = _family_and_config(folder, path)
    if layer_types(getattr(config, "text_config", config)) != {"full_attention"}:
        raise UserError(f"--model {path}: the rollout does not support sliding-window attention")
    return config


def _family_and_config(folder: str, path: str | Path) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """`path`: the user's, for error messages."""
    with user_error(f"--model {path}: config.json: cannot be used"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.model_type not in FAMILIES:
        raise UserError(
            f"--model {path}: is a {config.model_type} model; those of {', '.join(FAMILIES)} can be trained"
        )
    return FAMILIES[config.model_type], config


def _base_model(folder: str) -> str:
    """The folder or hub id itself, or the base model that its LoRA adapters name."""
    return model_path(base_model_of(Path(folder))) if is_adapter(Path(folder)) else folder


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


def merge_adapters(module: nn.Module) -> dict[str, Tensor]:
    """State dict of a model without adapters, each LoRA adapter of `module` added to its weight.

    It is loaded into another model: transformers saves one that ever had adapters as if it still did.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer  # installed: transformers has loaded the adapters

    for name, layer in list(module.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, layer.get_base_layer())
    return module.state_dict()
