"""The Gluon forward, whose source runs here on an emulated cluster, and on a GPU as it is."""

import pytest
import torch
import triton
from compare import assert_close, run
from gluon_emulator import Descriptor, Pointer, run_cluster
from vtfast_kernels import checks, gluon_logprob, linear_logprob
from vtfast_kernels.cases import Shape, logprob_inputs

SPLIT = 512


def emulated_statistics(hidden, weight, target, inv_temperature, seed: int, clusters: int) -> list[torch.Tensor]:
    (N, D), V = hidden.shape, len(weight)
    out = [torch.full((triton.cdiv(V, SPLIT), N), torch.nan) for _ in range(4)]
    for program in range(clusters):
        run_cluster(
            gluon_logprob.gluon_logprob_kernel,
            program,
            clusters,
            seed,
            hidden=Descriptor(hidden, [gluon_logprob.ROWS, gluon_logprob.DEPTH], divided=True),
            weight=Descriptor(weight, [gluon_logprob.COLUMNS, gluon_logprob.DEPTH], divided=False),
            target_ptr=Pointer(target),
            **dict(zip(("max_ptr", "sum_ptr", "mean_ptr", "target_logit_ptr"), map(Pointer, out), strict=True)),
            N=N,
            V=V,
            num_splits=len(out[0]),
            inv_temperature=inv_temperature,
            empty_offset=8 * gluon_logprob.STAGES,  # the emulator puts the ready slots' barriers first
            D=D,
            SPLIT=SPLIT,
            GROUP=2,
            STAGES=gluon_logprob.STAGES,
            ARRIVALS=gluon_logprob.ARRIVALS,
            ENTROPY=True,
            ROUND=hidden.dtype,
        )
    return out


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [Shape(700, 1100, 200), Shape(129, 513, 64), Shape(1, 300, 576)], ids=str)
def test_statistics_in_any_order_of_events(shape, seed):
    """Rows, columns and depths that are no multiples of a tile; a ring that goes round within a tile and across."""
    inputs = logprob_inputs(shape, torch.bfloat16)
    hidden, weight, target = (inputs[name] for name in ("hidden", "weight", "target"))
    top, total, mean, target_logit = emulated_statistics(hidden, weight, target, 1.25, seed, clusters=1 + seed % 2)
    logits = (hidden.float() @ weight.float().t()).bfloat16().double()
    scale = 1.25 / torch.tensor(2.0, dtype=torch.float64).log()
    for split, z in enumerate(logits.split(SPLIT, dim=1)):
        peak = z.amax(1)
        y = (z - peak[:, None]) * scale
        # one rounding of a logit to bf16 may differ, because sums of products come in another order
        assert_close({"top": top[split]}, {"top": peak}, plain={"top": peak * (1 + 2**-8)})
        torch.testing.assert_close(total[split].double(), y.exp2().sum(1), rtol=2e-3, atol=0)
        torch.testing.assert_close(mean[split].double(), (y.exp2() * y).sum(1), rtol=2e-2, atol=2e-2)
        here = (target >= split * SPLIT) & (target < split * SPLIT + z.shape[1])
        want = torch.where(here, z.gather(1, (target - split * SPLIT).clamp(0, z.shape[1] - 1)[:, None])[:, 0], 0.0)
        torch.testing.assert_close(target_logit[split].double(), want, rtol=2**-7, atol=1e-6)


def test_it_is_refused_elsewhere():
    inputs = logprob_inputs(Shape(7, 123, 64), torch.bfloat16)
    with pytest.raises(ValueError, match="impl"):
        linear_logprob.linear_logprob(**inputs, impl="gluon")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [Shape(1, 300, 64), Shape(700, 9000, 200), Shape(5600, 151936, 1536)], ids=str)
def test_on_hopper(shape, dtype):
    inputs = logprob_inputs(shape, dtype, "cuda")
    if checks.capability(inputs["hidden"]) != 90:
        pytest.skip("sm_90 alone")
    want = run("linear_logprob", inputs, "triton")
    assert_close(run("linear_logprob", inputs, "gluon"), want, plain=run("linear_logprob", inputs, "reference"))
