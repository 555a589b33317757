"""What the kernel tests share: running an op with its gradients, and error measures."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vtfast_kernels import checks
from vtfast_kernels.cases import FP32_TOLERANCE, LARGE, OPS, SMALL, VOCABULARIES


def shapes() -> list:
    """The registry's sizes; what takes minutes (the interpreter at a real vocabulary) is slow."""
    slow = pytest.mark.slow
    real = [pytest.param(s, marks=slow) for s in VOCABULARIES] if checks.interpreted() else VOCABULARIES
    return [*SMALL, *real, *(pytest.param(s, marks=slow) for s in LARGE)]


def run(name: str, inputs: dict[str, Any], impl: str, dtype: torch.dtype | None = None) -> dict:
    """Outputs and gradients of an op by name; `dtype` casts the floating inputs first. The gradients are those
    of an uneven sum of the differentiable outputs."""
    op = OPS[name]
    if dtype is not None:
        inputs = {k: _cast(v, dtype) for k, v in inputs.items()}
    leaves = {leaf: inputs[leaf].detach().clone().requires_grad_() for leaf in op.differentiable}
    out = op.run({**inputs, **leaves}, impl=impl)
    is_named = hasattr(out, "_asdict")
    outs = out if isinstance(out, tuple) else (out,)
    out = out._asdict() if is_named else dict(zip(op.outputs, outs, strict=False))
    trained = [x for x in out.values() if x is not None and x.requires_grad]
    uneven = [torch.linspace(3, -1 - i, x.numel()).to(x).view_as(x) for i, x in enumerate(trained)]
    if trained:
        sum((x * w).sum() for x, w in zip(trained, uneven, strict=True)).backward()
    grads = {f"d_{leaf}": x.grad for leaf, x in leaves.items()}
    return {k: v.detach() for k, v in {**out, **grads}.items() if v is not None}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(dtype) if is_float else value


def error(got: torch.Tensor, want: torch.Tensor, at_least: float = 0.0) -> float:
    """Relative error in the 2-norm, every element counting `at_least` so much; absolute where the truth is 0."""
    got, want = got.double().cpu(), want.double().cpu()
    assert got.shape == want.shape
    distance, size = (got - want).norm().item(), want.abs().clamp(min=at_least).norm().item()
    return distance / size if size > 0 else distance


# Log-probs come from logits of a few nats rounded to fp32: near 0 they are right to 1e-5 nats, not to five digits.
NATS = ("logp", "entropy", "kl", "loss")


def assert_close(
    got: dict, want: dict, tolerance: float = FP32_TOLERANCE, plain: dict | None = None, nats: bool = True
) -> None:
    """Within the tolerance, or no further from the truth than 1.5 x `plain` (PyTorch in the same precision)."""
    assert got.keys() == want.keys()
    for name in want:
        floor = 1.0 if nats and name in NATS else 0.0
        allowed = tolerance
        if plain is not None:
            allowed = max(allowed, 1.5 * error(plain[name], want[name], floor))
        e = error(got[name], want[name], floor)
        assert e <= allowed, (name, e, allowed)  # NaN fails too


class Watch(TorchDispatchMode):
    """Records the largest tensor that any operation makes and the multiply-adds of its matmuls."""

    largest = 0
    matmul = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.numel():
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            a, b = args[-2:]
            self.matmul += a.shape[0] * a.shape[1] * b.shape[1]
        return out
