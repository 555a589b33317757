"""Liger's kernels in place of Hugging Face's norms, MLP and rotary embedding, on CUDA. Its losses are not used.

Liger's own patch of Qwen2-VL (0.8.5) cannot be imported with transformers 5.2x, which dropped a class that it derives
from and the rotation that it calls. So its operations are patched in one by one.
"""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vtfast.model.policy import Policy
from vtfast.utils.text import first_line

log = logging.getLogger("vtfast")


def use_liger(policy: Policy) -> None:
    """Patch this model's RMSNorm, LayerNorm and SwiGLU. The rotation is a function of transformers' module, so it is
    patched there, for CUDA tensors only. If Liger cannot be imported, a warning says so and nothing is patched."""
    try:
        from liger_kernel.ops import LigerLayerNormFunction, LigerRMSNormFunction
        from liger_kernel.transformers import LigerSwiGLUMLP, liger_rotary_pos_emb
    except Exception as error:  # a broken installation raises anything
        reason = f"{type(error).__name__}: {first_line(error)}"
        log.warning("liger-kernel cannot be imported (%s); Hugging Face's layers are used, which are slower", reason)
        return

    def rms_norm(self, x: Tensor) -> Tensor:
        # fp32 inside, rounded before the weight, as Llama does; not in place, since gradients may be read elsewhere
        return LigerRMSNormFunction.apply(x, self.weight, self.variance_epsilon, 0.0, "llama", False, None)

    def layer_norm(self, x: Tensor) -> Tensor:
        return LigerLayerNormFunction.apply(x, self.weight, self.bias, self.eps)

    for module in policy.module.modules():
        kind: type = type(module)
        if kind is nn.LayerNorm:
            module.forward = types.MethodType(layer_norm, module)
        elif kind.__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(rms_norm, module)
        elif hasattr(module, "gate_proj"):  # silu(gate) * up in every family
            module.forward = types.MethodType(LigerSwiGLUMLP.forward, module)
    modeling: Any = sys.modules[type(policy.language_model).__module__]
    if not isinstance(modeling.apply_rotary_pos_emb, CudaRotation):
        modeling.apply_rotary_pos_emb = CudaRotation(liger_rotary_pos_emb, modeling.apply_rotary_pos_emb)
    log.info("Liger's RMSNorm, LayerNorm, SwiGLU and rotation are in use")


class CudaRotation:
    """`fast` for CUDA tensors, `plain` for others. M-RoPE's three axes are mixed into one table beforehand, so Liger's
    plain rotation is right for all families."""

    def __init__(self, fast: Callable[..., tuple[Tensor, Tensor]], plain: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self.fast, self.plain = fast, plain

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        if q.is_cuda and unsqueeze_dim == 1:
            return self.fast(q, k, cos, sin)
        return self.plain(q, k, cos, sin, unsqueeze_dim)
