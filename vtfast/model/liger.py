"""Liger's kernels in place of Hugging Face's norms, MLP and rotation, on CUDA. Its losses are not used.

Liger's own patch of Qwen2-VL (0.8.5) does not import beside transformers 5.2x, which dropped a class that it derives
from, and it rotates by a function that is gone as well. So its operations are put in one by one.
"""

from __future__ import annotations

import functools
import logging
import sys
import types
from collections.abc import Callable

from torch import Tensor, nn

from vtfast.model.policy import Policy

log = logging.getLogger("vtfast")


def use_liger(policy: Policy) -> None:
    """Patch this model's RMSNorm, LayerNorm and SwiGLU. The rotation is a function of transformers' module and patched
    there, for CUDA tensors alone."""
    from liger_kernel.ops import LigerLayerNormFunction, LigerRMSNormFunction
    from liger_kernel.transformers import LigerSwiGLUMLP, liger_rotary_pos_emb

    def rms_norm(self, x: Tensor) -> Tensor:
        # fp32 inside, rounded before the weight, as Llama does; not in place, since gradients may be read elsewhere
        return LigerRMSNormFunction.apply(x, self.weight, self.variance_epsilon, 0.0, "llama", False, None)

    def layer_norm(self, x: Tensor) -> Tensor:
        return LigerLayerNormFunction.apply(x, self.weight, self.bias, self.eps)

    for module in policy.module.modules():
        if type(module) is nn.LayerNorm:
            module.forward = types.MethodType(layer_norm, module)
        elif type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(rms_norm, module)
        elif hasattr(module, "gate_proj"):  # every family's is silu(gate) * up
            module.forward = types.MethodType(LigerSwiGLUMLP.forward, module)
    modeling = sys.modules[type(policy.language_model).__module__]
    if not getattr(modeling.apply_rotary_pos_emb, "is_ligers", False):
        modeling.apply_rotary_pos_emb = _on_cuda(liger_rotary_pos_emb, modeling.apply_rotary_pos_emb)
    log.info("Liger's RMSNorm, LayerNorm, SwiGLU and rotation are in use")


def _on_cuda(fast: Callable, plain: Callable) -> Callable:
    """M-RoPE's three axes are mixed into one table beforehand, so Liger's plain rotation is right for all families."""

    @functools.wraps(plain)
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1):
        if q.is_cuda and unsqueeze_dim == 1:
            return fast(q, k, cos, sin)
        return plain(q, k, cos, sin, unsqueeze_dim)

    rotate.is_ligers = True
    return rotate
