"""LoRA adapters (peft) on the policy. Without its adapter the policy is its own reference model."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence

from torch import nn

from vtfast.model.policy import Policy
from vtfast.utils.errors import UserError

log = logging.getLogger("vtfast")
AT_THE_HEAD = ("lm_head", "embed_tokens")


def add_lora(policy: Policy, rank: int, alpha: int, targets: Sequence[str]) -> None:
    """`add_adapters`, and say so in the log."""
    add_adapters(policy, rank, alpha, targets)
    trained = sum(p.numel() for p in policy.module.parameters() if p.requires_grad)
    log.info("LoRA of rank %d: %d trained weights", rank, trained)


def add_adapters(policy: Policy, rank: int, alpha: int, targets: Sequence[str]) -> None:
    """Freeze the model and put a trained adapter of `rank` beside every module named in `targets`.

    Raises UserError as `check_targets` does.
    """
    check_targets(policy, targets)
    from peft import LoraConfig

    policy.module.requires_grad_(False)
    policy.module.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=list(targets)))


def check_targets(policy: Policy, targets: Sequence[str]) -> None:
    """Raises UserError without peft, for the head or embeddings (the fused loss reads their weights directly), and for
    a name that no module has."""
    if importlib.util.find_spec("peft") is None:
        raise UserError("--use_peft: peft is not installed (pip install peft)")
    for target in targets:
        if target in AT_THE_HEAD:
            raise UserError(f"--lora_target_modules {target}: the head and embeddings take no adapter")
        layers = [m for n, m in policy.module.named_modules() if f".{n}".endswith(f".{target}")]
        if not layers:
            raise UserError(f"--lora_target_modules {target}: the model has no such module")
        if not all(isinstance(layer, nn.Linear) for layer in layers):
            raise UserError(f"--lora_target_modules {target}: is not a linear layer everywhere")
