"""What the ops owe to autograd and autocast, whichever op it is."""

import pytest
import torch
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


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_second_derivative_is_refused(impl, device, name):
    op = OPS[name]
    inputs = op.inputs(SHAPE, device=device)
    leaf = inputs[op.differentiable[0]].requires_grad_()
    loss = next(x for x in tensors_of(op.run(inputs, impl)) if x.requires_grad).sum()
    (grad,) = torch.autograd.grad(loss**2, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
