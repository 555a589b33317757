"""What a checkpoint from elsewhere may hold, checked before anything of it is built.

Weights are safetensors alone and lie in the folder; nothing in a checkpoint is run. Its config.json is believed as far
as the weights bear it out: numbers that would fill the memory or build a million layers are refused first.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from vtfast.utils.errors import UserError
from vtfast.utils.files import read_json

MOST = {
    "num_hidden_layers": 1000,
    "depth": 1000,
    "hidden_size": 1 << 17,
    "embed_dim": 1 << 17,
    "intermediate_size": 1 << 20,
    "vocab_size": 1 << 22,
    "num_attention_heads": 1 << 10,
    "num_key_value_heads": 1 << 10,
    "num_heads": 1 << 10,
    "head_dim": 1 << 12,
    "in_channels": 16,
    "in_chans": 16,
    "patch_size": 256,
    "temporal_patch_size": 16,
    "spatial_merge_size": 16,
    "window_size": 1 << 14,
    "max_position_embeddings": 1 << 30,
}
"""Whole numbers of a config.json that sizes follow from, with ten times what any model of the families has."""
REFUSED = {
    "auto_map": "names code of its own, which is never run",
    "quantization_config": "is of quantized weights, which cannot be trained; save the full ones",
    "transformers_weights": "names its weights' file itself; call it model.safetensors",
}
"""Keys of a config.json. None of them is needed, and all of them change what is loaded."""
ADAPTER_REFUSED = {
    "megatron_config": "would import a module, and is for models of another kind",
    "modules_to_save": "whole modules beside the adapters are not merged; save the merged model",
    "trainable_token_indices": "single embeddings are not merged; save the merged model",
}
"""Keys of an adapter_config.json: names of modules to import, and weights that merging would leave behind."""


def check_folder(folder: Path) -> None:
    """Raises UserError for a checkpoint folder with other weights than safetensors files of its own, or with a
    configuration that asks for more than weights. `check_size` looks at the weights."""
    if is_adapter(folder):
        base_of(folder)
        weights = folder / "adapter_model.safetensors"
        if not weights.is_file():
            raise UserError(f"{folder}: has LoRA adapters, but no {weights.name}{_pickles(folder)}")
        check_header(weights)
        return
    weight_files(folder)
    check_config(folder)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds LoRA adapters, which need the base model that they name."""
    return (folder / "adapter_config.json").is_file()


def base_of(folder: Path) -> str:
    """Folder or hub id of the base model that LoRA adapters name. Raises UserError where they are other adapters than
    a merge can take."""
    file = folder / "adapter_config.json"
    values = read_json(file)
    base = values.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{file}: base_model_name_or_path: {base!r:.80} names no model")
    if values.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type: {values.get('peft_type')!r:.80}: only LORA is read")
    for key, why in ADAPTER_REFUSED.items():
        if values.get(key):
            raise UserError(f"{file}: {key}: {why}")
    if is_adapter(Path(base)):
        raise UserError(f"{file}: base_model_name_or_path: {base} holds adapters itself")
    return base


def weight_files(folder: Path) -> list[Path]:
    """The weights that will be loaded: model.safetensors, or the shards of its index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise UserError(f"{folder}: has no *.safetensors weights{_pickles(folder)}")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, Mapping) or not shards:
        raise UserError(f"{index}: has no weight_map of names to files")
    for name in shards.values():
        plain = isinstance(name, str) and os.path.basename(name) == name
        if not plain or not name.endswith(".safetensors"):
            raise UserError(f"{index}: {name!r} is no *.safetensors file of this folder")
        if not (folder / name).is_file():
            raise UserError(f"{index}: {name} is missing; download it again")
    return [folder / name for name in sorted(set(shards.values()))]


def _pickles(folder: Path) -> str:
    found = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pt*"))
    if not found:
        return ""
    return (
        f" ({found[0]} is a pickle, which could run code and is never read: convert it with"
        " save_pretrained where you trust it)"
    )


def check_header(file: Path) -> int:
    """Numbers that the tensors of a safetensors file hold. Raises UserError where its header is damaged, or does not
    fit the file."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > min(size - 8, 100_000_000):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(opened.read(length))
        ends, count = [0], 0
        for name, tensor in header.items():
            if name != "__metadata__":
                start, end = tensor["data_offsets"]
                whole = all(type(n) is int and n >= 0 for n in (start, end, *tensor["shape"]))
                if not whole or start > end:
                    raise ValueError(f"{name} lies nowhere")
                ends.append(end)
                count += math.prod(tensor["shape"])
        if 8 + length + max(ends) != size:
            raise ValueError(f"{size} bytes, and {8 + length + max(ends)} are wanted")
    except (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError, struct.error) as error:
        raise UserError(f"{file}: damaged ({error}); copy or download it again") from None
    return count


def check_config(folder: Path) -> None:
    """Raises UserError for keys of a config.json that are refused, and for numbers that no model has."""
    file = folder / "config.json"
    config = read_json(file)
    for name in [key for key in config if key.endswith("_config")]:
        if config[name] is not None and not isinstance(config[name], dict):
            raise UserError(f"{file}: {name}: a mapping is wanted, not {config[name]!r:.80}")
    for name in ("", "text_config", "vision_config"):
        values = (config.get(name) or {}) if name else config
        for key, why in REFUSED.items():
            if values.get(key) is not None:
                raise UserError(f"{file}: {key}: {why}")
        for key, most in MOST.items():
            value = values.get(key)
            if value is not None and (type(value) is not int or not 0 < value <= most):
                where = f"{name}.{key}" if name else key
                raise UserError(f"{file}: {where}: {value!r:.80} is not between 1 and {most}")


def check_size(family: type[PreTrainedModel], config: PreTrainedConfig, folder: Path) -> None:
    """Raises UserError for damaged weights, and where `config` describes no model, or one so much larger than the
    weights that making it would be the harm. Builds the model without memory for its weights."""
    there = sum(check_header(file) for file in weight_files(folder))
    try:
        with torch.device("meta"):
            wanted = sum(parameter.numel() for parameter in family(config).parameters())
    except Exception as error:  # a stranger's values meet transformers' code: anything may come
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"{folder}/config.json: describes no {family.__name__} ({type(error).__name__}: {reason})"
        ) from None
    if wanted > 2 * there + 100_000_000:
        raise UserError(f"{folder}/config.json: describes a model of {wanted} weights, and the files hold {there}")
