"""Checks of a model folder from an untrusted source, before anything is built from it.

Only safetensors weights inside the folder are read, and no code in it is run. Sizes in its config.json are accepted as
far as the weight files agree with them: values that would exhaust memory or build a million layers are refused first.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel

from vtfast.utils.errors import UserError, user_error
from vtfast.utils.files import read_json

MAX_VALUES = {
    **dict.fromkeys(("in_channels", "in_chans", "temporal_patch_size", "spatial_merge_size"), 16),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads"), 1 << 10),
    "num_hidden_layers": 1000,
    "depth": 1000,
    "patch_size": 256,
    "head_dim": 1 << 12,
    "window_size": 1 << 14,
    "hidden_size": 1 << 17,
    "embed_dim": 1 << 17,
    "intermediate_size": 1 << 20,
    "vocab_size": 1 << 22,
    "max_position_embeddings": 1 << 30,
}
"""Upper bounds of the sizes in a config.json, ten times those of any model of the families. transformers checks none:
it would build a billion layers one by one."""
REFUSED_KEYS = {
    "auto_map": "names code of its own, which is never run",
    "quantization_config": "is of quantized weights, which cannot be trained; save the full ones",
    "transformers_weights": "names its weights' file itself; call it model.safetensors",
}
"""Keys of a config.json that change what is loaded; no model needs them."""
REFUSED_ADAPTER_KEYS = {
    "megatron_config": "would import a module, and is for models of another kind",
    "modules_to_save": "whole modules beside the adapters are not merged; save the merged model",
    "trainable_token_indices": "single embeddings are not merged; save the merged model",
}
"""Keys of an adapter_config.json: names of modules to import, and weights that merging would leave behind."""


def check_folder(folder: Path) -> None:
    """Raises UserError if the weights are not safetensors files of the folder, or if the configuration has refused keys
    or sizes. `check_size` reads the weights. A hub id, which is no folder, passes."""
    if is_adapter(folder):
        base_model_of(folder)
        count_stored_weights(folder / "adapter_model.safetensors")
    elif folder.is_dir():
        weight_files(folder)
        check_config(folder)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds LoRA adapters, which need the base model that they name."""
    return (folder / "adapter_config.json").is_file()


def base_model_of(folder: Path) -> str:
    """Folder or hub id of the base model that LoRA adapters name. Raises UserError for adapters that cannot be
    merged."""
    file = folder / "adapter_config.json"
    values = read_json(file)
    base, kind = values.get("base_model_name_or_path"), values.get("peft_type")
    problems = [f"{key}: {reason}" for key, reason in REFUSED_ADAPTER_KEYS.items() if values.get(key)]
    if not isinstance(base, str) or not base:
        problems.append(f"base_model_name_or_path: {base!r:.80} names no model")
    elif is_adapter(Path(base)):
        problems.append(f"base_model_name_or_path: {base} holds adapters itself")
    if kind != "LORA":
        problems.append(f"peft_type: {kind!r:.80}: only LORA is supported")
    if problems:
        raise UserError(f"{file}: {problems[0]}")
    return str(base)


def weight_files(folder: Path) -> list[Path]:
    """The weights that will be loaded: model.safetensors, or the shards of its index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    shards = read_json(index).get("weight_map") if index.is_file() else None
    names = sorted(set(map(str, shards.values()))) if isinstance(shards, Mapping) else []
    if not names:
        raise UserError(f"{folder}: has no *.safetensors weights{_pickle_note(folder)}")
    for name in names:
        if os.path.basename(name) != name or not name.endswith(".safetensors") or not (folder / name).is_file():
            raise UserError(f"{index}: {name!r} is not a *.safetensors file of this folder; download it again")
    return [folder / name for name in names]


def _pickle_note(folder: Path) -> str:
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt*") for path in folder.glob(pattern))
    hint = "is a pickle, which could run code and is never read: convert it with save_pretrained where you trust it"
    return f" ({pickles[0]} {hint})" if pickles else ""


def count_stored_weights(file: Path) -> int:
    """Number of values in the tensors of a safetensors file. Raises UserError if it is missing or damaged."""
    what = f"{file}: missing or damaged{_pickle_note(file.parent)}; copy or download it again"
    with user_error(what), safe_open(file, framework="pt") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118


def check_config(folder: Path) -> None:
    """Raises UserError for refused keys of a config.json, and for sizes that no model has."""
    file = folder / "config.json"
    problem = next(_config_problems(read_json(file)), None)
    if problem is not None:
        raise UserError(f"{file}: {problem}")


def _config_problems(config: Mapping[str, Any]) -> Iterator[str]:
    sections = {f"{key}.": value for key, value in config.items() if key.endswith("_config") and value is not None}
    for section, values in {"": config, **sections}.items():
        if not isinstance(values, dict):
            yield f"{section.rstrip('.')}: must be a mapping, not {values!r:.80}"
            continue
        for key, reason in REFUSED_KEYS.items():
            if values.get(key) is not None:
                yield f"{section}{key}: {reason}"
        for key, largest in MAX_VALUES.items():
            value = values.get(key)
            if value is not None and (type(value) is not int or not 0 < value <= largest):
                yield f"{section}{key}: {value!r:.80} is not between 1 and {largest}"


def check_size(family: type[PreTrainedModel], config: PreTrainedConfig, folder: Path) -> None:
    """Raises UserError for damaged weight files, and for a config.json that describes no model or one far larger than
    the weight files, which would exhaust memory. Builds the model on the meta device."""
    stored = sum(count_stored_weights(file) for file in weight_files(folder))
    file = folder / "config.json"
    with user_error(f"{file}: describes no {family.__name__}"), torch.device("meta"):
        described = sum(parameter.numel() for parameter in family(config).parameters())
    if described > 2 * stored + 100_000_000:
        raise UserError(f"{file}: describes a model of {described} weights, and the files hold {stored}")
