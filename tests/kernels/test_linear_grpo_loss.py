"""linear_grpo_loss: exactness, memory, matmul count, autograd citizenship, and Liger as an outside oracle."""

from dataclasses import replace

import pytest
import torch
from compare import Watch, assert_close, error, run, shapes
from oracles import OURS_ALONE, liger_loss, trl_loss
from vtfast_kernels import checks, loss_chunks
from vtfast_kernels.cases import Shape, linear_grpo_inputs, specs
from vtfast_kernels.chunked_logits import Chunk
from vtfast_kernels.grpo_loss import GRPOLoss
from vtfast_kernels.linear_grpo_loss import _say_drifted, linear_grpo_loss
from vtfast_kernels.linear_logprob import linear_logprob
from vtfast_kernels.linear_sample import linear_sample

SPECS = specs()
SHAPE = Shape(61, 123, 16)


# the interpreter needs seconds a case
LATER = pytest.mark.slow if checks.interpreted() else ()
EVERY_LOSS = [(name, False) for name in SPECS] + [
    (name, True) if "grpo" in name else pytest.param(name, True, marks=LATER) for name in SPECS
]


@pytest.mark.parametrize("name, on_policy", EVERY_LOSS)
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
        # other roundings of equal size, and one more of hidden: over a hundred tokens errors differ by a few percent
        slack = 1.15 if impl == "triton" and out.startswith("d_") else 1.05
        assert error(got[out], want[out]) <= slack * error(plain[out], want[out]), out
    assert error(got["loss"], want["loss"]) <= error(plain["loss"], want["loss"]) + 1e-3


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
    assert watch.matmul == (3 * one // 4 if impl == "triton" else one + 2 * one // 4)  # the others' are in the kernel


def near(inputs: dict, drift: torch.Tensor | float = 0.0, impl: str = "reference") -> torch.Tensor:
    head = (inputs[k] for k in ("hidden", "weight", "target"))
    return linear_logprob(*head, temperature=inputs["spec"].temperature, impl=impl) + drift


@pytest.mark.parametrize("name", ["grpo-token", "grpo-sequence"])
@pytest.mark.parametrize("drift", [0.0, 58.0, -58.0, 62.0, -2000.0])
def test_one_pass_is_exact_whatever_the_drift(impl, device, name, drift, small_chunks, caplog):
    """Log-probs that are said to be near the policy's, some nats away. Past 60 nats the call says that it is slower."""
    _say_drifted.cache_clear()
    inputs = linear_grpo_inputs(Shape(40, 60, 8), device=device, spec=SPECS[name])
    inputs |= {"old_logp": None, "sampler_logp": None}
    want = run("linear_grpo_loss", inputs, "reference", torch.float64)
    somewhere = torch.zeros(40, device=device)
    somewhere[20:] = drift
    got = run("linear_grpo_loss", inputs | {"near_logp": near(inputs, somewhere)}, impl)
    assert_close(got, want)
    assert ("60 nats" in caplog.text) == (abs(drift) > 60)


def test_infinite_logits_end(small_chunks):
    """As NaN, for the trainer to see, and not in an endless search for an offset."""
    inputs = linear_grpo_inputs(Shape(100, 60, 8), spec=SPECS["grpo-sequence"])
    inputs["sequence_id"] = torch.zeros(100, dtype=torch.int64)  # longer than a chunk
    inputs["weight"][3] = torch.inf
    assert run("linear_grpo_loss", inputs, "torch")["loss"].isnan()


def test_a_kl_far_above_one_does_not_overflow_fp16(impl, device):
    inputs = linear_grpo_inputs(Shape(40, 300, 16), torch.float16, device, spec=GRPOLoss("dapo"))
    inputs |= {"old_logp": None, "sampler_logp": None, "num_tokens": 4096}
    inputs["ref_logp"] = near(inputs)
    inputs["ref_logp"][7] += 15
    got = run("linear_grpo_loss", inputs, impl)
    assert got["d_hidden"].isfinite().all() and got["d_weight"].isfinite().all()


def test_one_pass_reads_the_logits_once(impl, device, small_chunks, monkeypatch):
    """The two-pass statistics are not called, and unknown log-probs (NaN) do no harm."""
    inputs = linear_grpo_inputs(SHAPE, device=device) | {"old_logp": None, "sampler_logp": None}
    want = run("linear_grpo_loss", inputs, "reference", torch.float64)
    inputs["near_logp"] = near(inputs)
    inputs["near_logp"][::7] = torch.nan
    called = []
    monkeypatch.setattr(Chunk, "__call__", lambda *_, **__: called.append(1))
    monkeypatch.setattr(loss_chunks, "dlogits_triton", lambda *_, **__: called.append(1))
    assert_close(run("linear_grpo_loss", inputs, impl), want)
    assert not called


@pytest.mark.parametrize("given", ["old_logp", "near_logp", None])
def test_fp16_gradients_survive_a_loss_scale(impl, device, given):
    """1 / num_tokens times a probability is below fp16's smallest number, before the loss scale can reach it."""
    inputs = linear_grpo_inputs(Shape(24, 4096, 32), torch.float16, device, spec=GRPOLoss("dapo", beta=0.0))
    inputs |= {"old_logp": None, "sampler_logp": None, "num_tokens": 358_400}
    if given is not None:
        inputs[given] = near(inputs)
    scaled = {}
    for dtype, which in ((torch.float64, "reference"), (None, "reference"), (None, impl)):
        leaves = {k: inputs[k].to(dtype or torch.float16, copy=True).requires_grad_() for k in ("hidden", "weight")}
        others = {
            k: v.to(dtype) if dtype and k in ("ref_logp", "old_logp") and v is not None else v
            for k, v in inputs.items()
        }
        (linear_grpo_loss(**{**others, **leaves}, impl=which).loss * 2.0**16).backward()
        scaled[dtype, which] = [leaf.grad for leaf in leaves.values()]
    want, plain, got = (scaled[key] for key in ((torch.float64, "reference"), (None, "reference"), (None, impl)))
    for ours, theirs, exact in zip(got, plain, want, strict=True):
        assert error(ours, exact) <= max(1.05 * error(theirs, exact), 1e-3)


@pytest.mark.parametrize(
    "level, N", [(8.0, 100), (31.0, 100), *(pytest.param(x, 700, marks=pytest.mark.slow) for x in (8.0, 16.0, 31.0))]
)
def test_equal_weights_give_equal_log_probs_in_bf16(impl, device, level, N):
    """Policy, reference and sampler round their logits alike: the ratio is 1, of a token and of 700."""
    V, D = 256, 64
    inputs = linear_grpo_inputs(Shape(N, V, D), torch.bfloat16, device, ignored=0.0)
    largest = (inputs["hidden"].float() @ inputs["weight"].float().t()).abs().max()
    inputs["hidden"] = (inputs["hidden"] * (level / largest)).bfloat16()
    hidden, weight = inputs["hidden"], inputs["weight"]
    row = {"row_key": torch.arange(N, device=device), "position": torch.zeros(N, dtype=torch.int64, device=device)}
    inputs["target"], sampler = linear_sample(hidden, weight, seed=1, **row, impl=impl)
    inputs["spec"] = GRPOLoss(beta=0.0)
    inputs |= {"old_logp": None, "sampler_logp": None}
    reference_model = linear_logprob(hidden, weight, inputs["target"], impl=impl)
    for near_logp in (None, sampler):
        policy = linear_grpo_loss(
            **inputs | {"hidden": hidden.detach().requires_grad_(), "near_logp": near_logp}, impl=impl
        )
        for other in (sampler, reference_model):
            ratio = (policy.logp.double() - other.double()).exp()
            assert (ratio - 1).abs().mean() < 1e-5
            assert abs((policy.logp.double() - other.double()).sum()) < N * 1e-5


def test_what_cannot_have_a_gradient_is_set_aside(impl, device, small_chunks):
    """Ignored tokens, and groups of equal rewards without a KL, in every loss that looks at whole sequences."""
    for name in ("no-kl", "grpo-sequence", "vespo-token", "sequence-truncate"):
        spec = replace(SPECS[name], beta=0.0)
        inputs = linear_grpo_inputs(Shape(128, 60, 8), device=device, spec=spec, ignored=0.3)
        inputs["sequence_id"] = torch.arange(128, device=device) // 16
        inputs["advantage"] = torch.tensor([1.0, 0, -0.5, 0, 0, 0.2, 0, -1.0], device=device)
        want = run("linear_grpo_loss", inputs, "reference", torch.float64)
        assert_close(run("linear_grpo_loss", inputs, impl), want, 5e-5 if "vespo" in name else 1e-5)


def test_tokens_that_are_left_keep_the_log_probs_near_their_own(impl, device, small_chunks, caplog):
    """With logits far apart, those of another token would be more than 60 nats away."""
    _say_drifted.cache_clear()
    inputs = linear_grpo_inputs(Shape(128, 60, 8), device=device, spec=SPECS["no-kl"])
    inputs["sequence_id"] = torch.arange(128, device=device) // 16
    inputs["advantage"] = torch.tensor([1.0, 0, -0.5, 0, 0, 0.2, 0, -1.0], device=device)
    inputs |= {"old_logp": None, "sampler_logp": None, "hidden": 200 * inputs["hidden"].detach()}
    inputs["near_logp"] = near(inputs)
    assert inputs["near_logp"].std() > 100
    run("linear_grpo_loss", inputs, impl)
    assert "60 nats" not in caplog.text


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
        inputs = linear_grpo_inputs(Shape(20, 60, 8), device=device, spec=SPECS[name]) | {"old_logp": None}
        head = [inputs[k] for k in ("hidden", "weight", "target")]
        logp = linear_logprob(*head, temperature=SPECS[name].temperature, impl=impl)
        given = run("linear_grpo_loss", inputs | {"sampler_logp": logp}, impl)
        # with log-probs at hand a row is read once, without them twice: other roundings
        assert_close(given, run("linear_grpo_loss", inputs | {"sampler_logp": None}, impl), 1e-5)


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
