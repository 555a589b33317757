"""A policy on PyTorch's meta device: the model that a config.json describes, with shapes but without weights.

It is built in a moment and takes no memory, for estimates of memory and work and for checks before a run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig

from vtfast.config import RunConfig
from vtfast.model.adapters import add_lora
from vtfast.model.loading import FAMILIES
from vtfast.model.policy import Policy, freeze_parts
from vtfast.utils.errors import UserError


def meta_policy(model: PreTrainedConfig, dtype: torch.dtype, freeze: Sequence[str] = ()) -> Policy:
    """The policy without adapters."""
    with torch.device("meta"):
        policy = Policy(FAMILIES[model.model_type](model).to(dtype).eval(), ())
    freeze_parts(policy, freeze)
    return policy


def meta_policy_for_run(model: PreTrainedConfig, config: RunConfig, dtype: torch.dtype) -> Policy:
    """The policy that `config` trains, with its frozen parts and adapters.

    Raises UserError for a part or a layer that the model does not have, and if nothing is left to train.
    """
    policy = meta_policy(model, dtype, config.freeze)
    if config.use_peft:
        add_lora(policy, config.lora_r, config.lora_alpha, config.lora_target_modules)
    if not any(parameter.requires_grad for parameter in policy.module.parameters()):
        raise UserError(f"--freeze {','.join(config.freeze)}: nothing is left to train")
    return policy
