"""linear_logprob against float64, against plain bf16 PyTorch, and at the sizes that trip kernels."""

import pytest
import torch
from compare import Watch, assert_close, error, run
from vtfast_kernels.cases import Shape, logprob_inputs
from vtfast_kernels.linear_logprob import linear_logprob


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [Shape(129, 1000, 100), Shape(7, 1000, 17)], ids=str)
def test_half_precision_error_is_not_above_plain_pytorch(impl, device, shape, dtype):
    inputs = logprob_inputs(shape, dtype, device)
    want = run("linear_logprob", inputs, "reference", torch.float64)
    plain = run("linear_logprob", inputs, "reference")
    got = run("linear_logprob", inputs, impl)
    for name in want:
        assert error(got[name], want[name]) <= 1.05 * error(plain[name], want[name]), name


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_logits_up_to_forty(impl, device, temperature):
    inputs = logprob_inputs(Shape(31, 1000, 64), device=device) | {"temperature": temperature}
    logits = inputs["hidden"] @ inputs["weight"].t()
    inputs["hidden"] *= 40 / logits.abs().max()
    want = run("linear_logprob", inputs, "reference", torch.float64)
    got = run("linear_logprob", inputs, impl)
    assert all(x.isfinite().all() for x in got.values())
    assert_close(got, want)


def test_certain_tokens_have_no_entropy(impl, device):
    """One logit 200 above the rest: probabilities underflow, nothing becomes infinite."""
    weight = torch.eye(64, device=device)
    logp, entropy = linear_logprob(200 * weight[:5], weight, torch.arange(5, device=device), entropy=True, impl=impl)
    assert (logp.abs() < 1e-6).all() and (entropy.abs() < 1e-6).all()


def test_ignored_targets(impl, device):
    inputs = logprob_inputs(Shape(40, 123, 16), device=device)
    inputs["target"][:] = -100
    got = run("linear_logprob", inputs, impl)
    assert all((x == 0).all() for x in got.values())


def test_chunks_and_repeats_are_exact(impl, device, small_chunks):
    inputs = logprob_inputs(Shape(129, 123, 16), device=device)
    first, second = (run("linear_logprob", inputs, impl) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_close(first, run("linear_logprob", inputs, "reference", torch.float64))


def test_row_blocks_in_groups_change_nothing(impl, device, monkeypatch):
    inputs = logprob_inputs(Shape(150, 300, 16), device=device)
    whole = run("linear_logprob", inputs, impl)
    for constant, value in {"GROUP": 2, "SPLIT": 128}.items():
        monkeypatch.setattr(f"vtfast_kernels.linear_logprob.{constant}", value)
    assert_close(run("linear_logprob", inputs, impl), whole, 1e-6)


def test_only_logp(impl, device):
    inputs = logprob_inputs(Shape(7, 300, 16), device=device) | {"entropy": False}
    got = run("linear_logprob", inputs, impl)
    assert_close(got, run("linear_logprob", inputs, "reference", torch.float64))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_side_costs_nothing(frozen, small_chunks):
    shape = Shape(96, 500, 32)
    inputs = logprob_inputs(shape)
    trained = {"hidden", "weight"} - {frozen}
    for name in trained:
        inputs[name].requires_grad_()
    with Watch() as watch:
        linear_logprob(**inputs)[0].sum().backward()
    assert inputs[frozen].grad is None
    assert all(inputs[name].grad is not None for name in trained)
    assert watch.matmul == 3 * shape.N * shape.V * shape.D  # logits twice, one gradient


def test_logits_never_exist_at_once(small_chunks):
    shape = Shape(256, 500, 8)
    inputs = logprob_inputs(shape)
    inputs["hidden"].requires_grad_()
    with Watch() as watch:
        linear_logprob(**inputs)[0].sum().backward()
    assert watch.largest <= shape.N * shape.V // 8


def test_a_row_does_not_depend_on_its_batch(impl, device):
    if impl == "torch":
        pytest.skip("BLAS chooses its own order of summation per shape")
    inputs = logprob_inputs(Shape(150, 500, 64), device=device)
    together = linear_logprob(**inputs, impl=impl)[0]
    alone = linear_logprob(**{**inputs, **{k: inputs[k][140:141] for k in ("hidden", "target")}}, impl=impl)[0]
    assert torch.equal(together[140:141], alone)


BAD = {
    "hidden type": lambda i: None,
    "hidden": lambda i: i["hidden"][0],
    "weight": lambda i: i["weight"][:, :-1],
    "target": lambda i: i["target"][:-1],
    "target dtype": lambda i: i["target"].int(),
    "target high": lambda i: i["target"] + 10_000,
    "target negative": lambda i: i["target"].clamp(max=-1),
    "weight dtype": lambda i: i["weight"].double(),
    "temperature": lambda i: 0.0,
    "impl": lambda i: "cuda",
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named(what):
    inputs = logprob_inputs(Shape(7, 100, 16), ignored=0)
    name = what.split()[0]
    with pytest.raises(ValueError, match=f"^{name}"):
        linear_logprob(**{**inputs, "impl": "torch", name: BAD[what](inputs)})


def test_triton_needs_cuda_tensors(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"^impl"):
        linear_logprob(**logprob_inputs(Shape(2, 10, 4)), impl="triton")
