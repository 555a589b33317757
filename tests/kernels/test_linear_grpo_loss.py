"""linear_grpo_loss: exactness, memory, matmul count, autograd citizenship, and Liger as an outside oracle."""

import pytest
import torch
from compare import Watch, assert_close, error, run, shapes
from oracles import OURS_ALONE, liger_loss, trl_loss
from vtfast_kernels import checks
from vtfast_kernels.cases import Shape, linear_grpo_inputs, specs
from vtfast_kernels.grpo_loss import GRPOLoss
from vtfast_kernels.linear_grpo_loss import linear_grpo_loss
from vtfast_kernels.linear_logprob import linear_logprob

SPECS = specs()
SHAPE = Shape(61, 123, 16)


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("name", SPECS)
def test_every_loss_matches_float64(impl, device, name, on_policy, small_chunks):
    """Whole sequences (about nine tokens) fit into the chunks of 32."""
    inputs = linear_grpo_inputs(SHAPE, device=device, spec=SPECS[name])
    if on_policy:
        inputs |= {"old_logp": None, "sampler_logp": None}
    want = run("linear_grpo_loss", inputs, "reference", torch.float64)
    # vespo multiplies the ratios of a whole sequence: a relative error grows with its length
    assert_close(run("linear_grpo_loss", inputs, impl), want, 5e-5 if "vespo" in name else 1e-5)


@pytest.mark.parametrize("shape", shapes(), ids=str)
def test_sizes_of_sequence_level(impl, device, shape):
    inputs = linear_grpo_inputs(shape, device=device, spec=SPECS["grpo-sequence"])
    want = run("linear_grpo_loss", inputs, "reference", torch.float64)
    assert_close(run("linear_grpo_loss", inputs, impl), want)


@pytest.mark.parametrize("name", ["grpo-sequence", "vespo-token", "sequence-truncate"])
def test_sequences_longer_than_a_chunk(impl, device, name, small_chunks):
    inputs = linear_grpo_inputs(Shape(200, 60, 8), device=device, spec=SPECS[name])
    inputs["old_logp"] = inputs["sampler_logp"] = None
    inputs["sequence_id"] = (torch.arange(200, device=device) >= 90).long() * 2
    inputs["sequence_id"][150:] = 3
    want = run("linear_grpo_loss", inputs, "reference", torch.float64)
    assert_close(run("linear_grpo_loss", inputs, impl), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["grpo-token", "dapo-sequence", "no-kl"])
def test_half_precision_error_is_not_above_plain_pytorch(impl, device, name, dtype):
    inputs = linear_grpo_inputs(Shape(129, 300, 64), dtype, device, spec=SPECS[name])
    # the other policies' log-probs belong to the inputs: take them where rounding cannot flip a clip
    inputs |= {"old_logp": None, "sampler_logp": None}
    want = run("linear_grpo_loss", inputs, "reference", torch.float64)
    plain = run("linear_grpo_loss", inputs, "reference")
    got = run("linear_grpo_loss", inputs, impl)
    for out in ("logp", "entropy", "d_hidden", "d_weight"):
        # the interpreter truncates to bf16 instead of rounding, which only the stored dlogits see
        slack = 1.6 if checks.interpreted() and out.startswith("d_") else 1.05
        assert error(got[out], want[out]) <= slack * error(plain[out], want[out]), out


def test_large_logits_and_temperatures(impl, device):
    for temperature in (0.5, 1.5):
        spec = GRPOLoss(temperature=temperature)
        inputs = linear_grpo_inputs(Shape(31, 400, 32), device=device, spec=spec)
        inputs["hidden"] *= 40 / (inputs["hidden"] @ inputs["weight"].t()).abs().max()
        inputs |= {"old_logp": None, "sampler_logp": None, "ref_logp": None}
        inputs["spec"] = GRPOLoss(beta=0.0, temperature=temperature)
        want = run("linear_grpo_loss", inputs, "reference", torch.float64)
        got = run("linear_grpo_loss", inputs, impl)
        assert all(x.isfinite().all() for x in got.values())
        assert_close(got, want)


def test_all_ignored(impl, device):
    inputs = linear_grpo_inputs(SHAPE, device=device)
    inputs["target"][:] = -100
    for other in ("old_logp", "ref_logp", "sampler_logp"):
        inputs[other].fill_(float("nan"))  # ignored tokens' values are never used
    assert all((x == 0).all() for x in run("linear_grpo_loss", inputs, impl).values())


def test_repeats_are_bitwise_equal(impl, device, small_chunks):
    inputs = linear_grpo_inputs(Shape(129, 123, 16), device=device)
    first, second = (run("linear_grpo_loss", inputs, impl) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", [n for n in SPECS if SPECS[n].loss_type not in OURS_ALONE])
def test_matches_liger(name):
    spec = SPECS[name]
    if name == "luspo-token":
        pytest.skip("Liger multiplies by the sequence length where TRL sums; defined for sequences only")
    inputs = linear_grpo_inputs(SHAPE, spec=spec, ignored=0.0)
    inputs["sequence_id"] = torch.arange(SHAPE.N) * len(inputs["advantage"]) // SHAPE.N
    if spec.loss_type == "vespo":
        inputs["sampler_logp"] = None  # Liger counts the padding's corrections
    if name == "luspo-sequence":
        inputs["spec"] = spec = GRPOLoss("luspo", beta=0.0, importance_level="sequence")
    results = []
    for function in (linear_grpo_loss, liger_loss):
        leaves = {k: inputs[k].clone().requires_grad_() for k in ("hidden", "weight")}
        out = function(**{**inputs, **leaves})
        loss = getattr(out, "loss", out)
        loss.backward()
        results.append({"loss": loss.detach(), **{k: v.grad for k, v in leaves.items()}})
    assert_close(results[0], results[1], 2e-5)


@pytest.mark.parametrize("name", ["grpo-token", "dapo-token", "cispo-token", "grpo-sequence"])
def test_matches_trl_over_its_own_head(name):
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    inputs = linear_grpo_inputs(SHAPE, spec=SPECS[name], ignored=0.0)
    other = {k: v for k, v in inputs.items() if k not in ("hidden", "weight", "target")}
    ours, theirs = ([inputs[k].clone().requires_grad_() for k in ("hidden", "weight")] for _ in range(2))
    out = linear_grpo_loss(*ours, inputs["target"], **other)
    out.loss.backward()
    temperature = inputs["spec"].temperature
    logp, *_ = ChunkedLogProbFunction.apply(*theirs, None, inputs["target"], temperature, 50)
    loss = trl_loss(logp, **other)
    loss.backward()
    assert error(out.loss.detach(), loss.detach(), 1.0) < 1e-5
    assert all(error(a.grad, b.grad) < 2e-5 for a, b in zip(ours, theirs, strict=True))


MATMULS = {  # vocabulary matmuls by what is trained
    ("hidden", "weight"): 3,
    ("hidden",): 2,
    ("weight",): 2,
    (): 1,
}


@pytest.mark.parametrize("trained", MATMULS)
def test_matmul_count(trained, small_chunks):
    shape = Shape(96, 500, 32)
    inputs = linear_grpo_inputs(shape, ignored=0.0)
    for name in trained:
        inputs[name].requires_grad_()
    with Watch() as watch:
        out = linear_grpo_loss(**inputs)
        if trained:
            out.loss.backward()
    assert watch.matmul == MATMULS[trained] * shape.N * shape.V * shape.D
    assert watch.largest <= shape.N * shape.V / 2.9  # never the [N, V] logits


def test_no_grad_does_no_gradient_work(small_chunks):
    inputs = linear_grpo_inputs(SHAPE)
    inputs["hidden"].requires_grad_()
    with torch.no_grad(), Watch() as watch:
        out = linear_grpo_loss(**inputs)
    assert not out.loss.requires_grad
    assert watch.matmul == SHAPE.N * SHAPE.V * SHAPE.D


def test_rows_without_gradient_skip_the_matmuls(impl, device, small_chunks):
    shape = Shape(128, 300, 16)
    inputs = linear_grpo_inputs(shape, device=device, spec=GRPOLoss(beta=0.0), ignored=0.0)
    inputs["sequence_id"] = torch.arange(128, device=device) // 16
    inputs["advantage"] = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, -1.0], device=device)
    inputs |= {"old_logp": None, "sampler_logp": None}
    want = run("linear_grpo_loss", inputs, "reference", torch.float64)
    with Watch() as watch:
        got = run("linear_grpo_loss", inputs, impl)
    assert_close(got, want)
    one = shape.N * shape.V * shape.D
    assert watch.matmul == one + 2 * one // 4


def test_incoming_gradient_scales(impl, device):
    inputs = linear_grpo_inputs(SHAPE, device=device)
    grads = []
    for factor in (1.0, torch.tensor(-0.25, device=device)):
        hidden = inputs["hidden"].clone().requires_grad_()
        (linear_grpo_loss(**{**inputs, "hidden": hidden}, impl=impl).loss * factor).backward()
        grads.append(hidden.grad)
    assert torch.equal(grads[0] * -0.25, grads[1])


def test_tied_embedding_and_hooks(impl, device):
    """The head's gradient adds to the embedding's, and fires the hook that DeepSpeed waits for, once."""
    inputs = linear_grpo_inputs(SHAPE, device=device)
    ids = torch.randint(SHAPE.V, (SHAPE.N,), device=device)
    grads, fired = [], []
    for which in (impl, "reference"):
        table = inputs["weight"].clone().requires_grad_()
        table.register_post_accumulate_grad_hook(lambda p: fired.append(p))
        hidden = torch.tanh(torch.nn.functional.embedding(ids, table))
        linear_grpo_loss(**{**inputs, "hidden": hidden, "weight": table}, impl=which).loss.backward()
        grads.append(table.grad)
    assert len(fired) == 2
    assert error(grads[0], grads[1]) < 1e-5


def test_sampler_equal_to_the_policy_changes_nothing(impl, device):
    for name in ("grpo-token", "grpo-sequence", "token-mask", "vespo-token"):
        inputs = linear_grpo_inputs(SHAPE, device=device, spec=SPECS[name]) | {"old_logp": None}
        head = [inputs[k] for k in ("hidden", "weight", "target")]
        logp = linear_logprob(*head, temperature=SPECS[name].temperature, impl=impl)
        given = run("linear_grpo_loss", inputs | {"sampler_logp": logp}, impl)
        assert_close(given, run("linear_grpo_loss", inputs | {"sampler_logp": None}, impl), 2e-6)


@pytest.mark.parametrize(
    "name, change",
    {
        "hidden": lambda i: i["hidden"].double(),
        "weight": lambda i: i["weight"].to(torch.bfloat16),
        "target": lambda i: i["target"] + 1000,
        "sequence_id": lambda i: i["sequence_id"].flip(0),
        "advantage": lambda i: i["advantage"] * float("nan"),
        "ref_logp": lambda i: None,
        "sampler_logp": lambda i: i["sampler_logp"].half().long(),
        "num_sequences": lambda i: -1,
        "spec": lambda i: None,
        "impl": lambda i: "fast",
    }.items(),
)
def test_bad_input_is_named(name, change):
    inputs = linear_grpo_inputs(SHAPE)
    with pytest.raises(ValueError, match=f"^{name}:"):
        linear_grpo_loss(**{**inputs, name: change(inputs)})
