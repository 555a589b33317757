"""The Gluon kernels, whose source runs here on an emulated cluster, and on a GPU as it is."""

import pytest
import torch
import triton
from compare import assert_close, error, run
from gluon_emulator import Descriptor, Pointer, run_cluster
from vtfast_kernels import checks, gluon_exponentials, gluon_logprob, gluon_ring
from vtfast_kernels.cases import OPS, Shape, linear_grpo_inputs, logprob_inputs, specs

SPLIT = 512
SHAPES = [Shape(700, 1100, 200), Shape(129, 513, 64), Shape(1, 300, 576)]
"""Rows, columns and depths that are no multiples of a tile; the ring goes round within a tile and across tiles."""
LN_2 = torch.tensor(2.0, dtype=torch.float64).log()


def emulate(kernel, stages: int, inputs: dict, seed: int, **arguments) -> None:
    hidden, weight, target = (inputs[name] for name in ("hidden", "weight", "target"))
    (N, D), V = hidden.shape, len(weight)
    S = gluon_ring.Settings(D, SPLIT, stages, group=2)
    clusters = 1 + seed % 2
    for program in range(clusters):
        run_cluster(
            kernel,
            program,
            clusters,
            seed,
            hidden=Descriptor(hidden, [S.rows, S.depth], divided=True),
            weight=Descriptor(weight, [S.columns, S.depth], divided=False),
            target_ptr=Pointer(target),
            N=N,
            V=V,
            num_splits=triton.cdiv(V, SPLIT),
            inv_temperature=1.25,
            empty_offset=8 * stages,  # the emulator puts the ready slots' barriers first
            S=S,
            **arguments,
        )


def unwritten(*shape: int) -> torch.Tensor:
    return torch.full(shape, torch.nan)


def logits_of(inputs: dict) -> torch.Tensor:
    return (inputs["hidden"].float() @ inputs["weight"].float().t()).bfloat16().double()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_in_any_order_of_events(shape, seed):
    inputs = logprob_inputs(shape, torch.bfloat16)
    target = inputs["target"]
    top, total, mean, target_logit = out = [
        torch.full((triton.cdiv(shape.V, SPLIT), shape.N), torch.nan) for _ in "1234"
    ]
    pointers = dict(zip(("max_ptr", "sum_ptr", "mean_ptr", "target_logit_ptr"), map(Pointer, out), strict=True))
    emulate(gluon_logprob.gluon_logprob_kernel, gluon_logprob.STAGES, inputs, seed, ENTROPY=True, **pointers)
    # sums of products come in another order, so that a logit may be rounded to its neighbour in bf16
    for split, z in enumerate(logits_of(inputs).split(SPLIT, dim=1)):
        y = (z - z.amax(1, keepdim=True)) * 1.25 / LN_2
        torch.testing.assert_close(top[split].double(), z.amax(1), rtol=2**-7, atol=0)
        torch.testing.assert_close(total[split].double(), y.exp2().sum(1), rtol=2e-3, atol=0)
        torch.testing.assert_close(mean[split].double(), (y.exp2() * y).sum(1), rtol=2e-2, atol=2e-2)
        here = (target >= split * SPLIT) & (target < split * SPLIT + z.shape[1])
        want = torch.where(here, z.gather(1, (target - split * SPLIT).clamp(0, z.shape[1] - 1)[:, None])[:, 0], 0.0)
        torch.testing.assert_close(target_logit[split].double(), want, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exponentials_in_any_order_of_events(shape, seed):
    inputs = logprob_inputs(shape, torch.bfloat16)
    target, z = inputs["target"], logits_of(inputs) * 1.25 / LN_2
    offset = (z.exp2().sum(1).log2() + torch.linspace(-2, 2, shape.N)).float()
    total, mean = (torch.full((triton.cdiv(shape.V, SPLIT), shape.N), torch.nan) for _ in "12")
    target_y, result = (
        torch.full((shape.N,), torch.nan),
        torch.full((shape.N, shape.V), torch.nan, dtype=torch.bfloat16),
    )
    emulate(
        gluon_exponentials.gluon_exponentials_kernel,
        gluon_exponentials.STAGES,
        inputs,
        seed,
        result=Descriptor(result, [128, 256], divided=True),
        offset_ptr=Pointer(offset),
        total_ptr=Pointer(total),
        mean_ptr=Pointer(mean),
        target_y_ptr=Pointer(target_y),
    )
    y = z - offset[:, None]
    close = {"rtol": 2e-2, "atol": 1e-4}  # neighbours in bf16, as above, and e in bf16
    torch.testing.assert_close(result.double(), y.exp2(), **close)
    torch.testing.assert_close(total.sum(0).double(), y.exp2().sum(1), rtol=2e-3, atol=0)
    torch.testing.assert_close(mean.sum(0).double(), (y.exp2() * y).sum(1), **close)
    scored = target >= 0
    want = y.gather(1, target.clamp(min=0)[:, None])[:, 0]
    torch.testing.assert_close(target_y[scored].double(), want[scored], **close)
    assert target_y[~scored].isnan().all()


def exponentials_torch(hidden, weight, target, offset, inv_temperature, result):
    y = (hidden.float() @ weight.float().t()).to(result.dtype).float() * (inv_temperature / LN_2.float())
    y -= offset[:, None]
    result.copy_(y.exp2())
    return y.exp2().sum(1), (y.exp2() * y).sum(1), y.gather(1, target.clamp(min=0)[:, None])[:, 0]


@pytest.mark.skipif(not checks.interpreted(), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("name", ["grpo-token", "grpo-sequence"])
def test_the_loss_after_the_exponentials(impl, device, name, monkeypatch):
    """What is done with the exponentials is that which is done after one pass, to the last bit but for their sums."""
    monkeypatch.setattr(checks, "require_hopper", lambda *matrices: None)
    monkeypatch.setattr(gluon_exponentials, "fill_exponentials", exponentials_torch)
    inputs = linear_grpo_inputs(Shape(70, 1000, 48), torch.bfloat16, device, spec=specs()[name])
    want, got = run("linear_grpo_loss", inputs, impl), run("linear_grpo_loss", inputs, "gluon")
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-2, atol=1e-2 * float(value.abs().max()))
        assert error(got[key].double(), value.double()) < 1e-3, key


@pytest.mark.parametrize("name", ["linear_logprob", "linear_grpo_loss"])
def test_they_are_refused_elsewhere(name):
    with pytest.raises(ValueError, match="impl"):
        OPS[name].run(OPS[name].inputs(Shape(7, 128, 64), torch.bfloat16), "gluon")


needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs an sm_90 GPU"
)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [Shape(1, 300, 64), Shape(700, 9000, 200), Shape(5600, 151936, 1536)], ids=str)
def test_log_probs_on_hopper(shape, dtype):
    inputs = logprob_inputs(shape, dtype, "cuda")
    want = run("linear_logprob", inputs, "triton")
    assert_close(run("linear_logprob", inputs, "gluon"), want, plain=run("linear_logprob", inputs, "reference"))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("shape", [Shape(1, 304, 64), Shape(700, 9000, 200), Shape(5600, 151936, 1536)], ids=str)
def test_loss_on_hopper(shape):
    inputs = linear_grpo_inputs(shape, torch.bfloat16, "cuda", spec=specs()["grpo-token"])
    want = run("linear_grpo_loss", inputs, "triton")
    assert_close(run("linear_grpo_loss", inputs, "gluon"), want, plain=run("linear_grpo_loss", inputs, "reference"))
