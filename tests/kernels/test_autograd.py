"""What the ops owe to autograd and autocast, whichever op it is."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vtfast_kernels.cases import OPS, Shape

SHAPE = Shape(13, 123, 16)
DIFFERENTIABLE = [name for name, op in OPS.items() if op.differentiable]


def tensors_of(out) -> list[torch.Tensor]:
    return [x for x in (out if isinstance(out, tuple) else (out,)) if x is not None]


def outputs_and_gradients(name: str, impl: str, device: str, autocast: bool) -> list[torch.Tensor]:
    op = OPS[name]
    inputs = op.inputs(SHAPE, device=device)
    for leaf in op.differentiable:
        inputs[leaf].requires_grad_()
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        out = tensors_of(op.run(inputs, impl))
        if op.differentiable:
            sum(x.sum() for x in out if x.requires_grad).backward()
    return [*out, *(inputs[leaf].grad for leaf in op.differentiable)]


@pytest.mark.parametrize("name", OPS)
def test_autocast_changes_nothing(impl, device, name):
    plain, cast = (outputs_and_gradients(name, impl, device, on) for on in (False, True))
    for a, b in zip(plain, cast, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


class MatmulPrecisions(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.bmm):
            self.seen.append((torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["linear_logprob", "linear_grpo_loss", "linear_sample"])
def test_fp32_matmuls_stay_fp32(impl, device, name):
    """Whatever the process allows for its other matmuls, which it gets back."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with MatmulPrecisions() as matmuls:
            outputs_and_gradients(name, impl, device, autocast=False)
        assert torch.get_float32_matmul_precision() == "medium" and torch.backends.cuda.matmul.allow_tf32
        inputs = OPS[name].inputs(SHAPE, device=device)
        with pytest.raises(ValueError):
            OPS[name].run(inputs | {"weight": inputs["weight"][:, 1:]}, impl)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(matmuls.seen) <= {("ieee", "ieee")}
    assert matmuls.seen or (impl, name) == ("triton", "linear_sample"), "no matmul was seen"


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_second_derivative_is_refused(impl, device, name):
    op = OPS[name]
    inputs = op.inputs(SHAPE, device=device)
    leaf = inputs[op.differentiable[0]].requires_grad_()
    loss = next(x for x in tensors_of(op.run(inputs, impl)) if x.requires_grad).sum()
    (grad,) = torch.autograd.grad(loss**2, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
