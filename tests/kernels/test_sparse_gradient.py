"""linear_grpo_loss with `sparse_tau`: the bound, exactly the columns that the reference keeps, the matmuls' sizes."""

from dataclasses import replace

import pytest
import torch
from compare import Watch, assert_close, error, run
from vtfast_kernels import checks, likely_columns, reference, sparse_gradient
from vtfast_kernels.cases import Shape, linear_grpo_inputs, neighbours, specs
from vtfast_kernels.grpo_loss import GRPOLoss
from vtfast_kernels.linear_grpo_loss import linear_grpo_loss
from vtfast_kernels.loss_chunks import TorchChunks, TritonChunks

OP = "linear_grpo_loss"
SPECS = specs()
SHAPE = Shape(N=40 if checks.interpreted() else 150, V=600, D=24)
TAU = 2.0**-10
KINDS = ("random", "flat", "one-hot", "tied")


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    """Also of the few tokens that the interpreter has time for."""
    if checks.interpreted():
        for module in (likely_columns, sparse_gradient, reference):
            monkeypatch.setattr(module, "BLOCK_ROWS", 16)


def inputs_of(
    kind: str, dtype=torch.float32, device="cpu", spec=SPECS["grpo-token"], shape=SHAPE, ignored=0.05
) -> dict:
    """Tokens that point at their target as strongly as `kind` says; a fifth have another target, of a probability just
    below that of a likely column."""
    inputs = linear_grpo_inputs(shape, device=device, spec=spec, ignored=ignored)
    generator = torch.Generator().manual_seed(3)
    N, V = shape.N, shape.V
    towards, strength = torch.randint(V, (N,), generator=generator), torch.rand(N, generator=generator)
    weight = inputs["weight"]
    if kind == "tied":  # 300 columns alike, which are too many, and pairs
        weight[:300] = weight[0].clone()
        weight[300::2] = weight[301::2].clone()
    logit = {"random": 60 * strength, "flat": 0 * strength, "one-hot": 40 + 20 * strength, "tied": 25 + 20 * strength}
    of = weight[towards.to(device)]
    hidden = of / of.square().sum(1, keepdim=True) * logit[kind].to(device)[:, None]
    p = torch.softmax(hidden @ weight.t() / spec.temperature, 1)
    unlikely = p.masked_fill(p > 0.8 * likely_columns.THRESHOLD, 0.0).argmax(1)
    other = torch.rand(N, generator=generator) < 0.2
    target = torch.where(other.to(device), unlikely, towards.to(device))
    inputs["hidden"], inputs["weight"] = hidden.to(dtype), weight.to(dtype)
    inputs["target"] = torch.where(inputs["target"] < 0, -100, target)
    logp = reference.linear_logprob(hidden, weight, inputs["target"], temperature=spec.temperature)
    return inputs | neighbours(logp)


def bounds(inputs: dict, dropped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the error of each token's d_hidden [N], and of the sum over the vocabulary of d_weight's errors."""
    scored = inputs["target"] >= 0
    inputs = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    weight, temperature = inputs.pop("weight"), inputs["spec"].temperature
    inputs = {
        k: v[scored] if isinstance(v, torch.Tensor) and v.shape[:1] == scored.shape else v for k, v in inputs.items()
    }
    hidden, target = inputs.pop("hidden"), inputs.pop("target")
    logp = reference.linear_logprob(hidden, weight, target, temperature=temperature).requires_grad_()
    (3 * reference.grpo_loss(logp, **inputs).loss).backward()  # as `run` weighs the loss
    size = torch.zeros_like(dropped, dtype=torch.float64)
    size[scored] = logp.grad.abs() * dropped[scored] / temperature
    return size * weight.norm(dim=1).max(), (size[scored] * hidden.norm(dim=1)).sum()


@pytest.mark.parametrize("tau", [2.0**-20, TAU, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_holds_in_float64(kind, tau):
    """Without any allowance."""
    inputs = inputs_of(kind, shape=Shape(400, 600, 24), ignored=0.0)
    exact = run(OP, inputs, "reference", torch.float64)
    got = run(OP, inputs | {"sparse_tau": tau}, "reference", torch.float64)
    for_hidden, for_weight = bounds(inputs, got["dropped"])
    errors = (got["d_hidden"] - exact["d_hidden"]).norm(dim=1)
    assert (errors <= for_hidden).all()
    assert (got["d_weight"] - exact["d_weight"]).norm(dim=1).sum() <= for_weight
    assert (got["dropped"] <= tau).all()
    assert all(torch.equal(got[name], exact[name]) for name in ("loss", "logp", "entropy"))
    if kind in ("random", "tied") and tau >= TAU:
        assert 0.01 < got["dense_rows"] < 0.99 and 0 < got["kept"] < 1 and errors.max() > 0.01 * for_hidden.max()
    if kind == "flat":
        assert got["dense_rows"] == 1 and got["kept"] == 0 and not errors.any()


LATER = pytest.mark.slow if checks.interpreted() else ()
LOSSES = ["grpo-token", "no-kl", *(pytest.param(name, marks=LATER) for name in ("vespo-token", "sequence-truncate"))]


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("name", [*LOSSES, "grpo-sequence"])
@pytest.mark.parametrize("kind", ["random", pytest.param("tied", marks=LATER)])
def test_the_columns_are_those_of_the_reference(impl, device, kind, name, on_policy):
    """One pass or two, in one chunk, as the reference: ignored tokens, clipped ones, blocks with all kinds."""
    inputs = inputs_of(kind, device=device, spec=SPECS[name]) | {"sparse_tau": 2.0**-14}
    inputs["advantage"][-1] = 1.0  # none is set aside, which would move the blocks' borders
    if on_policy:
        inputs |= {"old_logp": None, "sampler_logp": None}
    want = run(OP, inputs, "reference", torch.float64)
    assert want["dense_rows"] > 0.05 and want["kept"] > 0 and (want["dropped"] > 1e-7).sum() > SHAPE.N / 8
    assert_close(run(OP, inputs, impl), want, 1e-4 if "vespo" in name else 2e-5)


def test_columns_are_found_whatever_the_drift(impl, device):
    """One pass leaves 2^(z - offset), which is a probability only if the log-probs at hand are the policy's."""
    inputs = inputs_of("random", device=device) | {"sparse_tau": TAU, "sampler_logp": None}
    drift = torch.linspace(-30, 30, SHAPE.N, device=device)
    want = run(OP, inputs, "reference", torch.float64)
    assert_close(run(OP, inputs | {"near_logp": inputs["old_logp"] + drift}, impl), want, 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("on_policy", [False, True])
def test_half_precision(impl, device, dtype, on_policy):
    inputs = inputs_of("random", dtype, device) | {"sparse_tau": TAU}
    plain = run(OP, inputs, "reference")
    # rounded logits move the other policies' ratios
    inputs |= {"old_logp": None if on_policy else plain["logp"], "sampler_logp": None}
    plain = run(OP, inputs, "reference")
    want = run(OP, inputs | {"sparse_tau": 0.0}, "reference", torch.float64)
    dense = run(OP, inputs | {"sparse_tau": 0.0}, impl)
    got = run(OP, inputs, impl)
    for out in ("logp", "entropy", "d_hidden", "d_weight"):
        assert error(got[out], want[out]) <= 1.1 * error(dense[out], want[out]), out
    assert abs(got["dense_rows"] - plain["dense_rows"]) < 0.05
    both = (got["dropped"] > 0) & (plain["dropped"] > 0)  # a rounding may change on which side of a limit a token is
    assert both.sum() > SHAPE.N / 4 and error(got["dropped"][both], plain["dropped"][both]) < 0.2


@pytest.mark.parametrize("name", ["no-kl", "grpo-sequence"])
def test_chunks_and_tokens_set_aside(impl, device, name, small_chunks):
    """Every chunk has blocks of its own; tokens without a gradient take part in nothing."""
    inputs = inputs_of("random", device=device, spec=replace(SPECS[name], beta=0.0), ignored=0.3)
    inputs["advantage"][3] = 0.0
    exact = run(OP, inputs, "reference", torch.float64)
    got = run(OP, inputs | {"sparse_tau": TAU}, impl)
    # fp32 rounds p - 1 of a certain token, and everything by some 1e-6
    for name, bound in zip(("d_hidden", "d_weight"), bounds(inputs, got["dropped"] + 1e-6), strict=True):
        errors, size = ((got[name] - exact[name]).norm(dim=1), exact[name].norm(dim=1))
        if name == "d_weight":
            errors, size = errors.sum(), size.sum()
        assert (errors <= bound + 1e-5 * size).all(), name
    without = (inputs["target"] < 0) | (inputs["advantage"] == 0)[inputs["sequence_id"]]
    assert without.sum() > SHAPE.N / 4 and not got["dropped"][without].any() and not got["d_hidden"][without].any()


def test_without_tau_nothing_of_it_runs(impl, device, monkeypatch):
    inputs = inputs_of("random", device=device)
    want = run(OP, inputs, impl)
    assert not {"dropped", "dense_rows", "kept"} & set(want)
    for chunks in (TorchChunks, TritonChunks):
        monkeypatch.setattr(chunks, "likely_columns", None)
    got = run(OP, inputs | {"sparse_tau": 0.0}, impl)
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    with pytest.raises(TypeError):
        run(OP, inputs | {"sparse_tau": TAU}, impl)


@pytest.mark.parametrize("kind", ["flat", "random"])
def test_dense_tokens_have_their_exact_gradient(impl, device, kind):
    """All of them if none is certain; and of a mixed batch those that are not."""
    inputs = inputs_of(kind, device=device)
    want = run(OP, inputs, impl)
    got = run(OP, inputs | {"sparse_tau": TAU}, impl)
    exact = got["dropped"] == 0
    assert_close({"d": got["d_hidden"][exact]}, {"d": want["d_hidden"][exact]}, 1e-6)
    assert exact.sum() > 5 and exact.all() == (kind == "flat")
    if kind == "flat":
        assert got["dense_rows"] > 0.8 and got["kept"] == 0
        assert_close({"d": got["d_weight"]}, {"d": want["d_weight"]}, 1e-6)


@pytest.mark.parametrize("trained", [("hidden", "weight"), ("hidden",), ("weight",), ()])
def test_the_matmuls_are_as_small_as_it_says(trained):
    """Counted, against the shares that the output reports. A frozen side has no gradient, the other the same."""
    inputs = inputs_of("random", ignored=0.0) | {"sparse_tau": TAU}
    inputs["spec"] = GRPOLoss("cispo", beta=0.04, epsilon_high=1e9)  # no token is without a gradient
    whole = run(OP, inputs, "torch")
    leaves = {name: inputs[name].clone().requires_grad_(name in trained) for name in ("hidden", "weight")}
    with Watch() as watch:
        out = linear_grpo_loss(**{**inputs, **leaves})
        if trained:
            (3 * out.loss).backward()
    dense, kept = float(out.dense_rows), float(out.kept)
    share = dense + (1 - dense) * kept if trained else 0.0
    assert watch.matmul == pytest.approx(SHAPE.N * SHAPE.V * SHAPE.D * (1 + len(trained) * share), rel=1e-5)
    assert not trained or 0.05 < share < 0.9
    for name, leaf in leaves.items():
        assert (leaf.grad is None) == (name not in trained)
        assert leaf.grad is None or torch.equal(leaf.grad, whole[f"d_{name}"])
    assert trained or not (out.dropped.any() or dense or kept)


def test_no_token_has_a_gradient(impl, device):
    inputs = inputs_of("random", device=device) | {"sparse_tau": TAU}
    inputs["target"][:] = -100
    assert all((x == 0).all() for x in run(OP, inputs, impl).values())


def test_repeats_and_any_order_of_programs_give_the_same_bits(impl, device, monkeypatch):
    results = []
    for backwards in (False, False, True):
        if backwards and checks.interpreted():
            from triton.runtime import interpreter

            monkeypatch.setattr(interpreter, "range", lambda *bounds: range(*bounds)[::-1], raising=False)
        results.append(run(OP, inputs_of("random", device=device) | {"sparse_tau": TAU}, impl))
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in other)


def test_moving_dense_rows_to_the_front():
    d = torch.arange(40.0).view(8, 5)
    for seed in range(50):
        stay = torch.rand(8, generator=torch.Generator().manual_seed(seed)) < seed / 49
        moved = d.clone()
        order = sparse_gradient._to_front(moved, stay)
        assert order.sort().values.tolist() == stay.nonzero()[:, 0].tolist()
        assert torch.equal(moved[: len(order)], d[order])


def test_other_taus_and_sizes_compile_nothing_new():
    from bench.aot import recorded

    def keys(step: int) -> set[str]:
        with recorded(90) as launches:
            for on_policy in (False, True):
                inputs = linear_grpo_inputs(Shape(41 + 5 * step, 300, 32), torch.bfloat16)
                inputs |= {"old_logp": None, "sampler_logp": None} if on_policy else {}
                inputs["target"] = torch.cat([inputs["target"][:step], inputs["target"]])[step:]  # aligned or not
                run(OP, inputs | {"sparse_tau": TAU / (1 + step)}, "triton")
        return {key for key in launches if key.startswith("likely")}

    first = keys(0)
    assert len(first) == 2 and all(keys(step) == first for step in range(1, 5))


@pytest.mark.parametrize("which", ["torch", "reference"])
@pytest.mark.parametrize("tau", [-0.1, 1.0, True, float("nan"), "much", None])
def test_bad_tau_is_named(tau, which):
    with pytest.raises(ValueError, match=r"^sparse_tau:"):
        linear_grpo_loss(**inputs_of("random"), sparse_tau=tau, impl=which)
