"""A hash of a model's weights, to tell whether two models are the same."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

SAMPLED = 64
"""Values of each weight that are hashed."""


def base_model_fingerprint(module: nn.Module) -> str:
    """SHA-256 of the names, the shapes and some bf16 values of each weight, so that the dtype makes no difference."""
    digest, values = hashlib.sha256(), []
    for name, weight in module.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
        values.append(weight.detach().flatten()[:SAMPLED].bfloat16())
    digest.update(torch.cat(values).view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()
