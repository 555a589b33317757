"""linear_sample draws from exactly the softmax, and a row's draw depends on its key alone."""

import pytest
import torch
from compare import error, shapes
from vtfast_kernels.cases import Shape, sample_inputs
from vtfast_kernels.linear_sample import linear_sample
from vtfast_kernels.sampling_noise import exponential_noise


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("shape", shapes(), ids=str)
def test_every_implementation_draws_the_same_token(impl, device, shape, greedy):
    inputs = sample_inputs(shape, device=device, seed=3) | {"greedy": greedy}
    double = inputs | {k: inputs[k].double() for k in ("hidden", "weight")}
    token, logp = linear_sample(**double, impl="reference")
    got_token, got_logp = linear_sample(**inputs, impl=impl)
    assert got_token.dtype == torch.int64 and got_logp.dtype == torch.float32
    assert torch.equal(got_token, token)
    assert error(got_logp, logp, 1.0) < 1e-5


def draws(logits: torch.Tensor, M: int, rows: int = 4000, impl: str = "torch") -> torch.Tensor:
    """Counts [V] of M draws from softmax(logits), as M / rows steps of `rows` rows."""
    V, weight = len(logits), torch.eye(len(logits))
    hidden = logits.expand(rows, V).contiguous()
    count = torch.zeros(V, dtype=torch.long)
    for position in range(M // rows):
        where = {"row_key": torch.arange(rows) * 7, "position": torch.full((rows,), position)}
        token, _ = linear_sample(hidden, weight, seed=11, **where, impl=impl)
        count += torch.bincount(token, minlength=V)
    return count


def test_frequencies_are_the_softmax():
    """Chi-square over probabilities from 0.3 to 1e-4: 99.9% quantile at 49 degrees of freedom is 85.4."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, generator=generator) * 2
    logits[7] = logits.logsumexp(0) - 9.21
    M = 800_000
    expected = logits.double().softmax(0) * M
    assert expected.min() < 100
    count = draws(logits, M).double()
    assert ((count - expected) ** 2 / expected).sum() < 85.4


def test_tokens_of_probability_one_in_a_million():
    """32 of them under one token that holds the rest: 128 hits expected in 4 million draws."""
    logits = torch.full((33,), 1e-6).log()
    logits[32] = 0.0
    hits = int(draws(logits, 4_000_000, rows=16_000)[:32].sum())
    assert abs(hits - 128) < 4 * 128**0.5


def test_noise_is_exponential_down_to_its_smallest_values():
    rows = torch.arange(300)
    noise = exponential_noise(torch.tensor(5), rows, rows * 0, 0, 100_000).flatten().double()
    M = len(noise)
    assert (noise > 0).all() and noise.isfinite().all()
    assert abs(noise.mean() - 1) < 5 / M**0.5 and abs(noise.var() - 1) < 5 * 8**0.5 / M**0.5
    for edge in (1e-6, 1e-5, 1e-3, 0.1, 1.0, 5.0):
        p = -torch.expm1(torch.tensor(-edge, dtype=torch.float64))
        assert abs((noise < edge).double().mean() - p) < 5 * (p * (1 - p) / M) ** 0.5


def test_noise_of_neighbouring_keys_is_uncorrelated():
    """Rows, positions, seeds and vocabulary ids one apart, and the two ids that share a hash."""
    key, ids = torch.arange(64), 20_000
    noise = exponential_noise(torch.tensor(0), key, key * 0, 0, ids)
    others = [
        exponential_noise(torch.tensor(0), key + 1, key * 0, 0, ids),
        exponential_noise(torch.tensor(0), key, key * 0 + 1, 0, ids),
        exponential_noise(torch.tensor(1), key, key * 0, 0, ids),
        noise.roll(1, 1),
        noise.view(64, -1, 2).flip(2).reshape(64, -1),
    ]
    for other in others[:-1]:
        assert abs(torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1]) < 5e-3
    pairs = noise.view(-1, 2).t()
    assert abs(torch.corrcoef(pairs)[0, 1]) < 5e-3


def test_a_row_does_not_depend_on_its_batch(impl, device):
    inputs = sample_inputs(Shape(70, 300, 16), device=device)
    token, logp = linear_sample(**inputs, impl=impl)
    order = torch.randperm(70, device=device)[:33]
    per_row = {k: inputs[k][order] for k in ("hidden", "row_key", "position")}
    some_token, some_logp = linear_sample(**{**inputs, **per_row}, impl=impl)
    assert torch.equal(some_token, token[order])
    assert error(some_logp, logp[order], 1.0) < 1e-6


@pytest.mark.parametrize("greedy", [False, True])
def test_many_rows_draw_what_few_would(impl, device, monkeypatch, greedy):
    """From 128 rows on the logits are in memory on a GPU. Two tiles of a row, the second not full."""
    inputs = sample_inputs(Shape(130, 5000, 16), device=device) | {"greedy": greedy}
    token, logp = linear_sample(**inputs, impl=impl)
    monkeypatch.setattr("vtfast_kernels.linear_sample.ROWS_IN_MEMORY", 1000)
    fused_token, fused_logp = linear_sample(**inputs, impl=impl)
    assert torch.equal(token, fused_token)
    assert error(logp, fused_logp, 1.0) < 1e-6


@pytest.mark.parametrize("seed", [0, 3, -1, 2**63 + 5, 2**64 - 1])
def test_a_seed_may_be_a_tensor(impl, device, seed):
    inputs = sample_inputs(Shape(64, 500, 8), device=device) | {"seed": seed}
    signed = (seed + 2**63) % 2**64 - 2**63
    as_tensor = inputs | {"seed": torch.tensor(signed, device=device)}
    token = linear_sample(**inputs, impl=impl)[0]
    assert torch.equal(linear_sample(**as_tensor, impl=impl)[0], token)
    assert torch.equal(linear_sample(**inputs, impl="reference")[0], token)


@pytest.mark.parametrize("change", ["seed", "row_key", "position"])
def test_every_part_of_the_key_matters(impl, device, change):
    inputs = sample_inputs(Shape(64, 500, 8), device=device)
    inputs["hidden"] *= 0  # uniform: two independent draws agree once in 500
    changed = inputs | {change: inputs[change] + 1}
    same = linear_sample(**inputs, impl=impl)[0] == linear_sample(**changed, impl=impl)[0]
    assert same.sum() <= 3


def test_vocabulary_tiles_agree_with_one_pass(monkeypatch):
    inputs = sample_inputs(Shape(9, 5001, 16))
    whole = linear_sample(**inputs)
    monkeypatch.setattr("vtfast_kernels.linear_sample.CPU_TILE_BYTES", 1)
    tiled = linear_sample(**inputs)
    assert torch.equal(whole[0], tiled[0]) and error(tiled[1], whole[1], 1.0) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_logp_is_that_of_the_rounded_logits(impl, device, dtype):
    """In Triton; the CPU path computes in fp32."""
    inputs = sample_inputs(Shape(33, 500, 24), dtype, device)
    token, logp = linear_sample(**inputs, impl=impl)
    logits = inputs["hidden"].double() @ inputs["weight"].double().t()
    logits = (logits.to(dtype).double() if impl == "triton" else logits) / inputs["temperature"]
    want = logits.log_softmax(1).gather(1, token[:, None])[:, 0]
    assert error(logp, want, 1.0) < 1e-5


def test_a_row_of_nan_still_names_a_token(impl, device):
    for greedy in (False, True):
        inputs = sample_inputs(Shape(5, 50, 8), device=device) | {"greedy": greedy}
        want = linear_sample(**inputs, impl=impl)[0]
        inputs["hidden"][2] = float("nan")
        token, logp = linear_sample(**inputs, impl=impl)
        others = [0, 1, 3, 4]
        assert 0 <= token[2] < 50 and logp[2].isnan() and torch.equal(token[others], want[others])


@pytest.mark.parametrize(
    "name, change",
    {
        "hidden": lambda i: i["hidden"].long(),
        "weight": lambda i: i["weight"][:, :3],
        "row_key": lambda i: i["row_key"].int(),
        "position": lambda i: i["position"][:-1],
        "seed": lambda i: 0.5,
        "seed ": lambda i: True,
        " seed": lambda i: torch.zeros(1, dtype=torch.int64),
        "temperature": lambda i: -1.0,
    }.items(),
)
def test_bad_input_is_named(name, change):
    inputs = sample_inputs(Shape(5, 50, 8))
    with pytest.raises(ValueError, match=f"^{name.strip()}:"):
        linear_sample(**{**inputs, name.strip(): change(inputs)})
