"""What a Hopper GPU executes, on a CPU: loads by TMA descriptors, programs in any order, cuBLAS calls by name, and no
compilation in mid-run."""

import random
from dataclasses import replace

import pytest
import torch
from compare import assert_close, error, run
from vtfast_kernels import checks, chunked_logits, chunks
from vtfast_kernels.cases import OPS, Shape, linear_grpo_inputs, logprob_inputs, sample_inputs, specs
from vtfast_kernels.linear_sample import linear_sample

only_interpreted = pytest.mark.skipif(not checks.interpreted(), reason="needs TRITON_INTERPRET=1")
TMA_SHAPES = [Shape(129, 1000, 100), Shape(70, 4300, 128), Shape(1, 123, 17)]


@pytest.fixture
def by_tma(monkeypatch):
    """Matrices of half precision are read by descriptors, as on Hopper; the interpreter executes them, too."""
    if checks.interpreted():
        monkeypatch.setattr(checks, "tma_ready", lambda *matrices: matrices[0].dtype != torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", TMA_SHAPES, ids=str)
def test_log_probs_by_tma(impl, device, shape, dtype, by_tma):
    inputs = logprob_inputs(shape, dtype, device)
    want = run("linear_logprob", inputs, "reference", torch.float64)
    plain = run("linear_logprob", inputs, "reference")
    assert_close(run("linear_logprob", inputs, impl), want, plain=plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", TMA_SHAPES, ids=str)
def test_samples_by_tma(impl, device, shape, dtype, by_tma):
    inputs = sample_inputs(shape, dtype, device)
    token, logp = linear_sample(**inputs, impl=impl)
    logits = inputs["hidden"].double() @ inputs["weight"].double().t()
    logits = (logits.to(dtype).double() if impl == "triton" else logits) / inputs["temperature"]
    assert error(logp, logits.log_softmax(1).gather(1, token[:, None])[:, 0], 1.0) < 1e-4
    # a rounding may change the winner of a close race
    want, _ = linear_sample(**inputs, impl="reference")
    assert (token == want).float().mean() > 0.95


@pytest.fixture
def orders(monkeypatch):
    """Every launch runs its programs forwards, backwards and shuffled."""
    from triton.runtime import interpreter

    def backwards(programs):
        return programs[::-1]

    def shuffled(programs):
        return random.Random(0).sample(programs, len(programs))

    def of_programs(order):
        """The interpreter's range: of a grid it gets one bound, of a `tl.range` within a kernel three."""
        return lambda *bounds: order(range(*bounds)) if len(bounds) == 1 else range(*bounds)

    def each():
        for order in (list, backwards, shuffled):
            monkeypatch.setattr(interpreter, "range", of_programs(order), raising=False)
            yield

    return each


CASES = {
    **{name: (name, {}) for name in OPS},
    **{f"linear_grpo_loss {name}": ("linear_grpo_loss", {"spec": specs()[name]}) for name in ("no-kl", "vespo-token")},
    **{f"grpo_loss {name}": ("grpo_loss", {"spec": specs()[name]}) for name in ("grpo-sequence", "vespo-token")},
}


@only_interpreted
@pytest.mark.parametrize("case", CASES)
def test_any_order_of_programs_gives_the_same_bits(impl, device, case, orders, monkeypatch):
    """Two programs that write different numbers to one place would show, and a sum in the order of arrival."""
    monkeypatch.setattr("vtfast_kernels.paged_attention.PROGRAMS", 48)  # a row's context still has two splits
    name, options = CASES[case]
    results = []
    for _ in orders():
        inputs = OPS[name].inputs(Shape(13, 123, 16), device=device, **options)
        results.append(run(name, inputs, impl))
    for other in results[1:]:
        assert all(torch.equal(results[0][output], other[output]) for output in other)


class OnCuda:
    """A tensor that says it is on a GPU, and nothing else."""

    is_cuda = True

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


def test_cublas_is_asked_for_fp32_sums(monkeypatch):
    """The calls that only a GPU executes, word by word."""
    called = []
    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, lambda *args, name=name, **options: called.append((name, args, options)))
    d, weight, acc = OnCuda(torch.bfloat16), OnCuda(torch.bfloat16), OnCuda(torch.float32)
    chunked_logits.matmul_over_vocabulary(d, weight)
    chunked_logits.add_matmul(acc, d, weight, overwrite=True)
    chunked_logits.add_matmul(acc, d, weight, overwrite=False)
    assert called == [
        ("mm", (d, weight), {"out_dtype": torch.float32}),
        ("mm", (d, weight), {"out_dtype": torch.float32, "out": acc}),
        ("addmm", (acc, d, weight), {"out_dtype": torch.float32, "out": acc}),
    ]


@pytest.mark.parametrize("N", [4200, 5600, 8000, 16000, 22400, 45000])
def test_chunks_fill_the_gpu_in_whole_waves(N):
    """d_hidden of Qwen2-VL-2B has 6 tiles of columns and 22 of rows for 132 multiprocessors."""
    rows = chunks.chunk_rows(N, 151936, 1536, 2, "cuda", 132)
    assert rows == 2816 and rows * 151936 * 2 <= chunks.CUDA_CHUNK_BYTES
    tiles = -(-rows // 128) * (1536 // 256)
    assert tiles == 132


def test_a_chunk_has_as_many_waves_as_fit_the_budget():
    assert chunks.chunk_rows(22_400, 151936, 3584, 2, "cuda", 132) == 3 * 1152  # 14 tiles of columns, 9 of rows


def test_chunks_are_equal_where_a_wave_exceeds_the_budget():
    rows = chunks.chunk_rows(10_000, 151936, 256, 2, "cuda", 132)  # a wave would be 16,896 rows
    assert rows % 128 == 0 and rows * 151936 * 2 <= chunks.CUDA_CHUNK_BYTES
    assert -(-10_000 // rows) * rows - 10_000 < 3 * 128


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_at_size(impl, device, dtype):
    """N 4,096, V 32,768: sums as long as they get, and many chunks."""
    if checks.interpreted():
        pytest.skip("hours in the interpreter")
    inputs = linear_grpo_inputs(Shape(4096, 32768, 64), dtype, device, spec=specs()["no-kl"], ignored=0.0)
    inputs |= {"old_logp": None, "sampler_logp": None}
    plain = run("linear_grpo_loss", inputs, "reference")
    double = run("linear_grpo_loss", inputs, "reference", torch.float64)
    got = run("linear_grpo_loss", inputs | {"near_logp": plain["logp"]}, impl)
    for name in ("logp", "entropy", "d_hidden", "d_weight"):
        assert error(got[name], double[name]) <= 1.05 * error(plain[name], double[name]), name


def test_annealed_settings_and_ragged_batches_compile_nothing_new():
    """A run in which beta, clip bounds and temperature change every step, and so do N and the chunk borders."""
    from bench.aot import recorded

    def keys(step: int) -> set[str]:
        spec = replace(specs()["grpo-sequence"], beta=0.04 / (step + 1), epsilon_low=0.2 + 0.01 * step)
        with recorded(90) as launches:
            for shape in (Shape(40 + 8 * step, 300, 32), Shape(41 + 5 * step, 300, 32)):
                inputs = linear_grpo_inputs(shape, torch.bfloat16, spec=spec)
                for name in ("target", "old_logp", "ref_logp", "sampler_logp"):  # slices, aligned or not
                    inputs[name] = torch.cat([inputs[name][:step], inputs[name]])[step:]
                run("linear_grpo_loss", inputs, "triton")
                run("linear_logprob", logprob_inputs(shape, torch.bfloat16), "triton")
            for R in (16 + step, 32 + 2 * step):
                linear_sample(**sample_inputs(Shape(32 + R, 300, 32), torch.bfloat16), impl="triton")
        return set(launches)

    first = keys(0)
    assert len(first) > 10 and all(keys(step) == first for step in range(1, 6))
