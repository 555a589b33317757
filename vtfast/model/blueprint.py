"""The model as its config.json alone describes it: shapes without weights, in a moment and in no memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig

from vtfast.config import RunConfig
from vtfast.model.folder import base_of, check_config, is_adapter
from vtfast.model.loading import FAMILIES
from vtfast.model.lora import add_adapters
from vtfast.model.policy import Policy, freeze_parts, layer_types
from vtfast.utils.errors import UserError
from vtfast.utils.hub import model_path


def blueprint(model: PreTrainedConfig, config: RunConfig, dtype: torch.dtype) -> Policy:
    """The policy that `config` trains, on PyTorch's meta device: frozen parts and adapters as in the run.

    Raises UserError for a part or a layer that the model has not, and where nothing is left to train.
    """
    policy = skeleton(model, dtype, config.freeze)
    if config.use_peft:
        add_adapters(policy, config.lora_r, config.lora_alpha, config.lora_target_modules)
    if not any(parameter.requires_grad for parameter in policy.module.parameters()):
        raise UserError(f"--freeze {','.join(config.freeze)}: nothing is left to train")
    return policy


def skeleton(model: PreTrainedConfig, dtype: torch.dtype, freeze: Sequence[str] = ()) -> Policy:
    """The same without adapters: names, sizes and what is trained, for counting work."""
    with torch.device("meta"):
        policy = Policy(FAMILIES[model.model_type](model).to(dtype).eval(), ())
    freeze_parts(policy, freeze)
    return policy


def read_model_config(path: str | Path) -> PreTrainedConfig:
    """The config.json of a folder or hub id; of the base model, where the folder holds LoRA adapters.

    Raises UserError where there is none, it cannot be read, or its family or its attention is none of ours.
    """
    folder = model_path(path)
    try:
        if is_adapter(Path(folder)):
            folder = model_path(base_of(Path(folder)))
        if (Path(folder) / "config.json").is_file():
            check_config(Path(folder))
        model = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"--model {path}: its config.json cannot be used ({reason})") from None
    if model.model_type not in FAMILIES:
        raise UserError(f"--model {path}: is a {model.model_type} model; those of {', '.join(FAMILIES)} can be trained")
    text = getattr(model, "text_config", model)
    if layer_types(text) != {"full_attention"}:
        raise UserError(f"--model {path}: the rollout does not support sliding-window attention")
    return model
