"""LoRA adapters (peft) on the policy. With its adapters disabled the policy is its own reference model."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence

from torch import nn

from vtfast.model.policy import Policy
from vtfast.utils.errors import UserError

log = logging.getLogger("vtfast")
NOT_ADAPTABLE = ("lm_head", "embed_tokens")
"""The fused loss reads the weights of these directly."""


def add_lora(policy: Policy, rank: int, alpha: int, targets: Sequence[str]) -> None:
    """Freeze the model and add a trained adapter of `rank` to every module named in `targets`.

    Raises UserError if peft is not installed, and for a target that is the head or the embeddings, that no module is
    named after, or that is not a linear layer everywhere.
    """
    if importlib.util.find_spec("peft") is None:
        raise UserError("--use_peft: peft is not installed (pip install peft)")
    for target in targets:
        layers = [m for n, m in policy.module.named_modules() if f".{n}".endswith(f".{target}")]
        problem = None
        if target in NOT_ADAPTABLE:
            problem = "the head and embeddings take no adapter"
        elif not layers:
            problem = "the model has no such module"
        elif not all(isinstance(layer, nn.Linear) for layer in layers):
            problem = "is not a linear layer everywhere"
        if problem is not None:
            raise UserError(f"--lora_target_modules {target}: {problem}")
    from peft import LoraConfig

    policy.module.requires_grad_(False)
    policy.module.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=list(targets)))
    if policy.device.type != "meta":  # the model of an estimate
        trained = sum(p.numel() for p in policy.module.parameters() if p.requires_grad)
        log.info("LoRA of rank %d: %d trained weights", rank, trained)
