"""Every loss type: closed form against autograd, against float64, and against TRL's own loss."""

import pytest
import torch
from compare import assert_close, error, run
from oracles import OURS_ALONE, trl_loss
from vtfast_kernels.cases import OPS, Shape, grpo_inputs, specs
from vtfast_kernels.grpo_loss import GRPOLoss, grpo_loss

SPECS = specs()
POLICIES = {
    "off-policy": (),
    "on-policy": ("old_logp", "sampler_logp"),
    "no-sampler": ("sampler_logp",),
    "on-policy-sampler": ("old_logp",),
}


def inputs_for(name: str, policies: str, N: int = 61, device="cpu") -> dict:
    inputs = grpo_inputs(Shape(N), device=device, spec=SPECS[name])
    if policies == "on-policy-sampler":
        inputs["sampler_logp"] = inputs["logp"] + inputs["sampler_logp"] - inputs["old_logp"]
    return inputs | dict.fromkeys(POLICIES[policies])


@pytest.mark.parametrize("policies", POLICIES)
@pytest.mark.parametrize("name", SPECS)
def test_matches_float64_and_autograd(impl, device, name, policies):
    inputs = inputs_for(name, policies, device=device)
    want = run("grpo_loss", inputs, "reference", torch.float64)
    assert_close(run("grpo_loss", inputs, impl), want, nats=False)


@pytest.mark.parametrize("policies", POLICIES)
@pytest.mark.parametrize("name", [n for n in SPECS if SPECS[n].loss_type not in OURS_ALONE])
def test_matches_trl(name, policies):
    inputs = inputs_for(name, policies)
    inputs = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    ours, theirs = (inputs["logp"].clone().requires_grad_() for _ in range(2))
    out = grpo_loss(**{**inputs, "logp": ours}, impl="reference")
    out.loss.backward()
    loss = trl_loss(**{**inputs, "logp": theirs})
    loss.backward()
    assert error(out.loss.detach(), loss.detach()) < 1e-6
    assert error(ours.grad, theirs.grad) < 1e-6


@pytest.mark.parametrize("N", [0, 1, 7, 1030, 2500])
@pytest.mark.parametrize("name", ["grpo-token", "grpo-sequence", "vespo-token", "sequence-truncate"])
def test_sizes(impl, device, name, N):
    """One token, one-token sequences, empty sequences, sequences longer than the kernel's block."""
    inputs = grpo_inputs(Shape(N), device=device, spec=SPECS[name])
    # a product over hundreds of tokens would leave vespo's weight without a digit in fp32
    for other in ("old_logp", "sampler_logp"):
        inputs[other] = inputs["logp"] + (inputs[other] - inputs["logp"]) / max(1, N / 60)
    want = run("grpo_loss", inputs, "reference", torch.float64)
    assert_close(run("grpo_loss", inputs, impl), want, plain=run("grpo_loss", inputs, "reference"), nats=False)


def test_sampler_equal_to_the_policy_changes_nothing(impl, device):
    for name, spec in SPECS.items():
        inputs = inputs_for(name, "on-policy", device=device)
        without = run("grpo_loss", inputs, impl)
        given = run("grpo_loss", inputs | {"sampler_logp": inputs["logp"].clone()}, impl)
        assert all(torch.equal(without[k], given[k]) for k in without), spec


def test_tokens_that_the_sampler_could_not_score_are_not_corrected(impl, device):
    inputs = inputs_for("token-truncate", "off-policy", device=device)
    exact = inputs | {"sampler_logp": inputs["sampler_logp"].clone()}
    exact["sampler_logp"][::3] = exact["old_logp"][::3]
    inputs["sampler_logp"] = exact["sampler_logp"].clone()
    inputs["sampler_logp"][::3] = float("nan")
    want, got = run("grpo_loss", exact, impl), run("grpo_loss", inputs, impl)
    assert all(torch.equal(want[k], got[k]) for k in want)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "luspo", "dr_grpo"])
def test_micro_batches_add_up_under_global_denominators(impl, device, loss_type):
    inputs = inputs_for(f"{loss_type}-token", "off-policy", device=device)
    whole = run("grpo_loss", inputs, impl)
    cut, S = int((inputs["sequence_id"] < 4).sum()), len(inputs["advantage"])
    total, grads = 0.0, []
    for part in (slice(0, cut), slice(cut, None)):
        half = {k: v[part] if torch.is_tensor(v) and len(v) == len(inputs["logp"]) else v for k, v in inputs.items()}
        half |= {"num_sequences": S, "num_tokens": torch.tensor(len(inputs["logp"]), device=device)}
        out = run("grpo_loss", half, impl)
        total, grads = total + out["loss"], [*grads, out["d_logp"]]
    assert error(total, whole["loss"]) < 5e-6
    assert error(torch.cat(grads), whole["d_logp"]) < 5e-6


def test_epsilon_high_defaults_to_epsilon_low():
    assert GRPOLoss(epsilon_low=0.1, epsilon_high=None) == GRPOLoss(epsilon_low=0.1, epsilon_high=0.1)


@pytest.mark.parametrize("name", ["grpo-token", "grpo-sequence", "linear"])
def test_strided_inputs(impl, device, name):
    """Every tensor is one column of a table."""
    op = "linear_grpo_loss" if name == "linear" else "grpo_loss"
    inputs = OPS[op].inputs(Shape(61, 123, 16), device=device, spec=SPECS.get(name, GRPOLoss()))
    strided = {
        k: torch.stack([v, torch.full_like(v, 3)], -1)[..., 0] if torch.is_tensor(v) else v for k, v in inputs.items()
    }
    assert not strided["old_logp"].is_contiguous()
    want, got = run(op, inputs, impl), run(op, strided, impl)
    assert all(torch.equal(want[k], got[k]) for k in want)


def test_zero_beta_never_touches_the_reference(impl, device):
    inputs = inputs_for("no-kl", "off-policy", device=device)
    inputs["ref_logp"] = torch.full_like(inputs["logp"], float("nan"))
    got = run("grpo_loss", inputs, impl)
    assert "kl" not in got and got["loss"].isfinite() and got["d_logp"].isfinite().all()


def test_small_kl_keeps_its_digits():
    """e^d - d - 1 at d = 1e-3 cancels to a fifth of its value in fp32."""
    logp = torch.full((5,), -2.0)
    ref = logp + torch.tensor([1e-3, -1e-3, 1e-2, 0.2, 0.3])
    spec, ids, advantage = GRPOLoss(beta=1.0), torch.zeros(5, dtype=torch.long), torch.zeros(1)
    kl = grpo_loss(logp, ids, advantage, spec=spec, ref_logp=ref).kl
    d = (ref - logp).double()
    assert error(kl, d.expm1() - d) < 1e-5


@pytest.mark.parametrize(
    "name, options",
    {
        "loss_type": {"loss_type": "ppo"},
        "importance_level": {"importance_level": "batch"},
        "importance_level ": {"loss_type": "cispo", "importance_level": "sequence"},
        "max_completion_length": {"loss_type": "dr_grpo"},
        "beta": {"beta": -1.0},
        "beta ": {"beta": float("nan")},
        "epsilon_low": {"epsilon_low": -0.1},
        "temperature": {"temperature": 0.0},
        "delta": {"delta": 0.0},
        "vllm_importance_sampling_clip_min": {"vllm_importance_sampling_clip_min": 4.0},
        "vllm_importance_sampling_mode": {"vllm_importance_sampling_mode": "token"},
    }.items(),
)
def test_bad_spec_is_named(name, options):
    with pytest.raises(ValueError, match=f"^{name.strip()}:"):
        GRPOLoss(**options)


@pytest.mark.parametrize(
    "name, change",
    {
        "sequence_id": lambda i: i["sequence_id"].flip(0),
        "sequence_id ": lambda i: i["sequence_id"] + 10,
        "sequence_id  ": lambda i: i["sequence_id"].float(),
        "advantage": lambda i: i["advantage"] * float("nan"),
        "advantage ": lambda i: i["advantage"] * float("inf"),
        "ref_logp": lambda i: None,
        "old_logp": lambda i: i["old_logp"][:-1],
        "logp": lambda i: i["logp"][None],
        "num_tokens": lambda i: 0,
        "spec": lambda i: "grpo",
    }.items(),
)
def test_bad_input_is_named(name, change):
    inputs = grpo_inputs(Shape(20))
    with pytest.raises(ValueError, match=f"^{name.strip()}:"):
        grpo_loss(**{**inputs, name.strip(): change(inputs)})
