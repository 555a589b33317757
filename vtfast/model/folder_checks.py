"""Checks of a model folder from an untrusted source, before anything is built from it.

Only safetensors weights inside the folder are read, and no code in it is run. Sizes in its config.json are accepted as
far as the weight files agree with them: values that would exhaust memory or build a million layers are refused first.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel

from vtfast.utils.errors import UserError
from vtfast.utils.files import read_json
from vtfast.utils.text import first_line

MAX_VALUES = {
    16: ("in_channels", "in_chans", "temporal_patch_size", "spatial_merge_size"),
    256: ("patch_size",),
    1000: ("num_hidden_layers", "depth"),
    1 << 10: ("num_attention_heads", "num_key_value_heads", "num_heads"),
    1 << 12: ("head_dim",),
    1 << 14: ("window_size",),
    1 << 17: ("hidden_size", "embed_dim"),
    1 << 20: ("intermediate_size",),
    1 << 22: ("vocab_size",),
    1 << 30: ("max_position_embeddings",),
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
    or sizes. `check_size` reads the weights."""
    if is_adapter(folder):
        base_model_of(folder)
        weights = folder / "adapter_model.safetensors"
        if not weights.is_file():
            raise UserError(f"{folder}: has LoRA adapters, but no {weights.name}{_pickle_note(folder)}")
        count_stored_weights(weights)
        return
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
    base = values.get("base_model_name_or_path")
    problem = None
    if not isinstance(base, str) or not base:
        problem = f"base_model_name_or_path: {base!r:.80} names no model"
    elif values.get("peft_type") != "LORA":
        problem = f"peft_type: {values.get('peft_type')!r:.80}: only LORA is supported"
    elif refused := [key for key in REFUSED_ADAPTER_KEYS if values.get(key)]:
        problem = f"{refused[0]}: {REFUSED_ADAPTER_KEYS[refused[0]]}"
    elif is_adapter(Path(base)):
        problem = f"base_model_name_or_path: {base} holds adapters itself"
    if problem is not None:
        raise UserError(f"{file}: {problem}")
    assert isinstance(base, str)
    return base


def weight_files(folder: Path) -> list[Path]:
    """The weights that will be loaded: model.safetensors, or the shards of its index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise UserError(f"{folder}: has no *.safetensors weights{_pickle_note(folder)}")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, Mapping) or not shards:
        raise UserError(f"{index}: has no weight_map of names to files")
    for name in shards.values():
        in_folder = isinstance(name, str) and os.path.basename(name) == name
        if not in_folder or not name.endswith(".safetensors"):
            raise UserError(f"{index}: {name!r} is not a *.safetensors file of this folder")
        if not (folder / name).is_file():
            raise UserError(f"{index}: {name} is missing; download it again")
    return [folder / name for name in sorted(set(shards.values()))]


def _pickle_note(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pt*"))
    if not pickles:
        return ""
    return (
        f" ({pickles[0]} is a pickle, which could run code and is never read: convert it with"
        " save_pretrained where you trust it)"
    )


def count_stored_weights(file: Path) -> int:
    """Number of values in the tensors of a safetensors file. Raises UserError if it is damaged."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: damaged ({error}); copy or download it again") from None


def check_config(folder: Path) -> None:
    """Raises UserError for refused keys of a config.json, and for sizes that no model has."""
    file = folder / "config.json"
    config = read_json(file)
    for name in [key for key in config if key.endswith("_config")]:
        if config[name] is not None and not isinstance(config[name], dict):
            raise UserError(f"{file}: {name}: must be a mapping, not {config[name]!r:.80}")
    for section in ("", "text_config", "vision_config"):
        values = (config.get(section) or {}) if section else config
        for key, reason in REFUSED_KEYS.items():
            if values.get(key) is not None:
                raise UserError(f"{file}: {key}: {reason}")
        for largest, keys in MAX_VALUES.items():
            for key in keys:
                value = values.get(key)
                if value is not None and (type(value) is not int or not 0 < value <= largest):
                    name = f"{section}.{key}" if section else key
                    raise UserError(f"{file}: {name}: {value!r:.80} is not between 1 and {largest}")


def check_size(family: type[PreTrainedModel], config: PreTrainedConfig, folder: Path) -> None:
    """Raises UserError for damaged weight files, and for a config.json that describes no model or one far larger than
    the weight files, which would exhaust memory. Builds the model on the meta device."""
    stored = sum(count_stored_weights(file) for file in weight_files(folder))
    file = folder / "config.json"
    try:
        with torch.device("meta"):
            described = sum(parameter.numel() for parameter in family(config).parameters())
    except Exception as error:  # transformers raises errors of any type for values that it does not expect
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{file}: describes no {family.__name__} ({reason})") from None
    if described > 2 * stored + 100_000_000:
        raise UserError(f"{file}: describes a model of {described} weights, and the files hold {stored}")
