"""What every op of the registry owes, whichever it is: a new one is tested here by itself.

Of `reference.py` these tests know nothing but that it is plain PyTorch: an op's own file compares it with others' code.
"""

import inspect
from pathlib import Path

import pytest
import torch
from compare import assert_close, error, run, shapes
from vtfast_kernels import cases, reference
from vtfast_kernels.cases import OPS, Shape

ROOT = Path(__file__).parents[2]


def test_every_op_is_in_the_registry():
    """An op is a file with a function of its name."""
    files = {file.stem for file in (ROOT / "kernels").glob("*.py") if f"def {file.stem}(" in file.read_text()}
    assert set(OPS) == files
    assert all(op.function.__name__ == name for name, op in OPS.items())


def test_every_op_is_in_the_pages():
    table = (ROOT / "kernels" / "README.md").read_text("utf-8")
    page = (ROOT / "docs" / "pages" / "kernels.md").read_text("utf-8")
    for name in OPS:
        assert f"\n| `{name}` |" in table and f"\n::: kernels.{name}.{name}\n" in page, name


@pytest.mark.parametrize("name", OPS)
def test_signature_is_that_of_the_reference(name):
    ours, plain = (inspect.signature(f).parameters for f in (OPS[name].function, getattr(reference, name)))
    assert list(ours) == [*plain, "impl"]
    assert ours["impl"].default == "auto"
    for parameter in ours.keys() - {"impl"}:
        assert ours[parameter].kind == plain[parameter].kind, parameter
        assert ours[parameter].default == plain[parameter].default, parameter


@pytest.mark.parametrize("shape", shapes(), ids=str)
@pytest.mark.parametrize("name", OPS)
def test_fp32_matches_float64(impl, device, name, shape):
    """Outputs and gradients."""
    inputs = OPS[name].inputs(shape, device=device)
    want = run(name, inputs, "reference", torch.float64)
    assert_close(run(name, inputs, impl), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_half_precision_error_is_near_that_of_plain_pytorch(impl, device, name, dtype):
    inputs = OPS[name].inputs(Shape(31, 123, 100), dtype, device)
    want = run(name, inputs, "reference", torch.float64)
    plain = run(name, inputs, "reference")
    got = run(name, inputs, impl)
    for output in want:
        allowed = max(1.5 * error(plain[output], want[output]), cases.FP32_TOLERANCE)
        assert error(got[output], want[output]) <= allowed, output


@pytest.mark.parametrize("name", OPS)
def test_the_same_call_twice_is_bitwise_equal(impl, device, name):
    first, second = (run(name, OPS[name].inputs(Shape(13, 123, 16), device=device), impl) for _ in range(2))
    assert all(torch.equal(first[output], second[output]) for output in first)
