"""Gathering rows: PyTorch's indexing is the oracle, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtfast.model.row_gather import RowGather


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-1, 6), max_size=40), st.integers(0, 2**31))
def test_equals_indexing(index, seed):
    index = torch.tensor(index, dtype=torch.int64)
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    real = index >= 0
    out = RowGather(index, 7)(ours)
    assert out[real].equal(x[index[real]])
    # What stands in the padding's gradient must not matter: here it is not even a number.
    weight = torch.arange(1.0, 3 * len(index) + 1, dtype=torch.float64).view(-1, 3)
    out.backward(weight.masked_fill(~real[:, None], torch.nan))
    theirs[index[real]].backward(weight[real])
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-6)


def test_no_rows():
    x = torch.zeros(0, 4, requires_grad=True)
    RowGather(torch.empty(0, dtype=torch.int64), 0)(x).sum().backward()
    assert x.grad.shape == (0, 4)


def test_many_uses_of_a_bf16_row_are_summed_in_fp32():
    """300 gradients of 1 are 300 and not 256, where bf16 addition stops moving."""
    x = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    RowGather(torch.zeros(300, dtype=torch.int64), 2)(x).sum().backward()
    assert x.grad.tolist() == [[300.0], [0.0]]


@pytest.mark.parametrize("shape", [(5,), (5, 2, 3)])
def test_rows_of_any_shape(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    gather = RowGather(torch.tensor([4, 0, 0, 2, -1]), 5)
    assert torch.autograd.gradcheck(lambda x: gather(x)[:4], x)
