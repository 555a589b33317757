"""Liger's kernels in place of Hugging Face's norms, MLP and rotation, on CUDA. Its losses are not used."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

from torch import Tensor
from transformers.models.qwen2_vl import modeling_qwen2_vl

from vtfast.model import Policy

log = logging.getLogger("vtfast")


def use_liger(policy: Policy) -> None:
    """Patch this model: RMSNorm, the vision tower's LayerNorm, SwiGLU. The rotation is a function of transformers'
    module and patched there, for CUDA tensors alone."""
    from liger_kernel.transformers import apply_liger_kernel_to_qwen2_vl, liger_rotary_pos_emb

    apply_liger_kernel_to_qwen2_vl(
        rope=False,
        cross_entropy=False,
        fused_linear_cross_entropy=False,
        rms_norm=True,
        layer_norm=True,
        swiglu=True,
        model=policy.module,
    )
    rotate = modeling_qwen2_vl.apply_rotary_pos_emb
    if not getattr(rotate, "is_ligers", False):
        modeling_qwen2_vl.apply_rotary_pos_emb = _on_cuda(liger_rotary_pos_emb, rotate)
    log.info("Liger's RMSNorm, LayerNorm, SwiGLU and rotation are in use")


def _on_cuda(fast: Callable, plain: Callable) -> Callable:
    """Qwen2-VL mixes its three M-RoPE axes into one table beforehand, so Liger's plain rotation is the right one."""

    @functools.wraps(plain)
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1):
        if q.is_cuda and unsqueeze_dim == 1:
            return fast(q, k, cos, sin)
        return plain(q, k, cos, sin, unsqueeze_dim)

    rotate.is_ligers = True
    return rotate
