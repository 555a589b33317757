"""`python -m bench kernels`: linear_grpo_loss, forward + backward, beside TRL, Liger and plain PyTorch.

The op's tests run first; a red test means no numbers. Rounds alternate the order of the contestants, ratios
are paired within a round, memory is the growth of a fresh process. The outside losses are the tests' oracles.
On a GPU the floor is three bare cuBLAS matmuls of the same run, in the best of several chunkings. Rows are appended to
results/kernels.csv.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable

import torch
from vtfast_kernels import reference
from vtfast_kernels.cases import CPU_BENCH, GPU_BENCH, OPS, Shape, linear_grpo_inputs
from vtfast_kernels.chunks import chunk_rows_of
from vtfast_kernels.grpo_loss import GRPOLoss
from vtfast_kernels.linear_grpo_loss import linear_grpo_loss
from vtfast_kernels.linear_logprob import linear_logprob

from bench import _sparse
from bench._harness import (
    GOALS_MISSED,
    NO_NUMBERS,
    ROOT,
    absence,
    append,
    device_name,
    growth_in_child,
    measure_growth,
    paired_ratio,
    quantiles,
    seconds,
    tests_pass,
    versions,
)

TESTS = tuple(f"kernels/test_{op}.py" for op in ("grpo_loss", "linear_grpo_loss", "linear_logprob"))
SPARSE_TESTS = ("kernels/test_sparse_gradient.py",)
sys.path.insert(0, str(ROOT / "tests" / "kernels"))  # the oracles
GOALS = {"trl": 0.3, "plain": 0.75}  # on the CPU, our time / theirs
TOLERANCE = {"cpu": 1e-3, "cuda": 3e-2}
"""How far a peer's gradients may be from ours, relative; bf16 rounds more. One that is gets no numbers,
and if all are none gets any: ours may be what is wrong."""
MEMORY_GOAL = 1 / 3  # on the CPU, our growth / plain's


def inputs_of(shape: Shape, device: str) -> dict:
    """Sixteenths of the tokens are sequences; with KL and the log-probs of the policy that sampled."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    inputs = linear_grpo_inputs(Shape(16, shape.V, shape.D), dtype, device, spec=GRPOLoss(), ignored=0.0)
    generator = torch.Generator().manual_seed(0)
    N = shape.N
    inputs["hidden"] = torch.randn(N, shape.D, generator=generator).to(device, dtype)
    inputs["target"] = torch.randint(shape.V, (N,), generator=generator).to(device)
    inputs["sequence_id"] = (torch.arange(N) * 16 // N).to(device)
    inputs["advantage"] = torch.randn(16, generator=generator).to(device)
    head = (inputs[name] for name in ("hidden", "weight", "target"))
    with torch.no_grad():
        logp = linear_logprob(*head)
    noise = torch.randn(N, generator=generator).to(device)
    inputs |= {"old_logp": logp, "sampler_logp": None, "ref_logp": logp + 0.3 * noise}
    for name in ("hidden", "weight"):
        inputs[name].requires_grad_()
    return inputs


def contestants(inputs: dict, device: str) -> dict[str, Callable[[], torch.Tensor]]:
    """name -> forward of the loss; the caller runs backward."""
    head = {k: inputs[k] for k in ("hidden", "weight", "target")}
    rest = {k: v for k, v in inputs.items() if k not in head}
    hidden, weight, target = head.values()

    def plain_loss(logp: torch.Tensor) -> torch.Tensor:
        """TRL's, as that of the peers; without TRL the plain PyTorch that the kernels are tested against."""
        if importlib.util.find_spec("trl") is None:
            return reference.grpo_loss(logp, **rest).loss
        from oracles import trl_loss

        return trl_loss(logp, **rest)

    def plain():
        logits = (hidden @ weight.t()).float()
        return plain_loss(torch.log_softmax(logits, -1).gather(1, target[:, None])[:, 0])

    def trl():
        from oracles import trl_loss
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        logp, *_ = ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, 32768, None, 1.0, ("entropy",))
        return trl_loss(logp, **rest)

    def liger():
        from oracles import liger_loss

        return liger_loss(**inputs)

    def liger_hopper():
        # fails where its CUTLASS is missing; `apply` would fall back to PyTorch there
        import liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90  # noqa: F401
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
            LigerFusedLinearScaledCrossEntropyFunction as Fused,
        )
        from oracles import trl_loss

        return trl_loss(-Fused.apply(hidden, weight, target), **rest)

    def cut_cross_entropy():
        from cut_cross_entropy import linear_cross_entropy

        return plain_loss(-linear_cross_entropy(hidden, weight, target, reduction="none"))

    out = {"ours": lambda: linear_grpo_loss(**inputs).loss, "plain": plain, "trl": trl, "liger": liger}
    if device == "cuda":
        compiled = torch.compile(lambda h, w, t: torch.log_softmax((h @ w.t()).float(), -1).gather(1, t[:, None])[:, 0])

        out["compile"] = lambda: plain_loss(compiled(hidden, weight, target))
        out["liger hopper"] = liger_hopper
        out["cut_cross_entropy"] = cut_cross_entropy
    return out


FLOOR = "three matmuls"


def three_matmuls(inputs: dict, rows: int) -> Callable[[], None]:
    """The floor on a GPU: logits, d_hidden and d_weight as bare cuBLAS calls, in chunks of so many tokens."""
    hidden, weight = inputs["hidden"].detach(), inputs["weight"].detach()
    d_weight = torch.empty_like(weight, dtype=torch.float32)

    def run():
        logits = hidden.new_empty(rows, len(weight))
        for first, x in zip(range(0, len(hidden), rows), hidden.split(rows), strict=True):
            z = torch.mm(x, weight.t(), out=logits[: len(x)])
            z @ weight
            if first:
                torch.addmm(d_weight, z.t(), x, out_dtype=torch.float32, out=d_weight)
            else:
                torch.mm(z.t(), x, out_dtype=torch.float32, out=d_weight)

    return run


def floors(inputs: dict) -> dict[str, Callable[[], None]]:
    """The same work in several chunkings: ours, and those that the memory allows."""
    hidden, weight = inputs["hidden"], inputs["weight"]
    N, itemsize = len(hidden), weight.element_size()
    free = torch.cuda.mem_get_info()[0] // 2
    sizes = {min(N, rows) for rows in (chunk_rows_of(hidden, weight), 2816, 4096, N)}
    fit = sorted(rows for rows in sizes if rows * len(weight) * itemsize < free)
    return {f"{FLOOR}, {rows} rows": three_matmuls(inputs, rows) for rows in fit}


def step(forward: Callable[[], torch.Tensor], inputs: dict) -> Callable[[], None]:
    def run():
        inputs["hidden"].grad = inputs["weight"].grad = None
        forward().backward()

    return run


def growth(name: str, shape: Shape, threads: int) -> float:
    """Peak resident memory in MB that one forward + backward adds in a process of its own."""
    return growth_in_child(
        f"from vtfast_kernels.cases import Shape; from bench.kernels import grow; grow({name!r}, {shape!r}, {threads})"
    )


def grow(name: str, shape: Shape, threads: int) -> None:
    torch.set_num_threads(threads)
    small = inputs_of(Shape(64, 512, shape.D), "cpu")
    step(contestants(small, "cpu")[name], small)()  # imports and thread pools are not the op's memory
    inputs = inputs_of(shape, "cpu")
    measure_growth(step(contestants(inputs, "cpu")[name], inputs))


def compare(shape: Shape, device: str, rounds: int, slow_rounds: int, threads: int) -> bool:
    inputs = inputs_of(shape, device)
    runs = {name: step(f, inputs) for name, f in contestants(inputs, device).items()}
    if device == "cuda":
        runs |= floors(inputs)
    times: dict[str, list[float]] = {name: [] for name in runs}
    norms, rows, ours = {}, [], None
    for name in list(runs):
        try:
            runs[name]()  # warm-up
            if name.startswith(FLOOR):
                continue
            gradients = [inputs[of].grad.float() for of in ("hidden", "weight")]
            norms[name] = float(gradients[0].norm())
            ours = gradients if name == "ours" else ours
            pairs = zip(gradients, ours, strict=True)
            apart = max(float((theirs - mine).norm() / theirs.norm()) for theirs, mine in pairs)
        except Exception as error:  # a peer that cannot run must not stop the others
            if name == "ours":
                raise
            del runs[name], times[name]
            rows.append(_row(shape, device, name, absence(name, error)))
            continue
        if not apart <= TOLERANCE[device]:
            del runs[name], times[name], norms[name]
            rows.append(_row(shape, device, name, "differs"))
            print(f"  {name}: its gradients differ from ours by {apart:.1e}")
    if set(norms) <= {"ours"}:
        raise SystemExit("  no peer computes the same: no numbers")
    del ours
    for index in range(rounds):
        order = list(runs) if index % 2 == 0 else list(runs)[::-1]
        for name in order:
            if name != "liger" or index < slow_rounds:
                times[name].append(seconds(runs[name], device))
    memory = {}
    for name in runs:
        inputs["hidden"].grad = inputs["weight"].grad = None
        if device == "cuda" and not name.startswith(FLOOR):
            torch.cuda.reset_peak_memory_stats()
            base = torch.cuda.memory_allocated()
            runs[name]()
            memory[name] = (torch.cuda.max_memory_allocated() - base) / 2**20
        elif device == "cpu":
            memory[name] = growth(name, shape, threads)
    flops = OPS["linear_grpo_loss"].flops(shape)
    print(f"\nlinear_grpo_loss forward + backward, {shape}, {device}, {rounds} rounds, order alternated")
    row = "  {:<18} {:>9} {:>9} {:>9} {:>8} {:>16} {:>10} {:>12}"
    print(row.format("provider", "p20 ms", "p50 ms", "p80 ms", "TFLOP/s", "ours / theirs", "growth MB", "|d_hidden|"))
    ok = True
    floor = min((quantiles(t)[1] for name, t in times.items() if name.startswith(FLOOR)), default=None)
    for name, t in times.items():
        if not t:
            continue
        p20, p50, p80 = (1e3 * value for value in quantiles(t))
        ratio, low, high = paired_ratio(times["ours"][: len(t)], t)
        goal = GOALS.get(name) if device == "cpu" else None
        verdict = f"{ratio:.3f}" + (f" (<= {goal})" if goal else "")
        ok &= goal is None or ratio <= goal
        rate, mb = f"{flops / p50 / 1e9:.3g}", f"{memory[name]:.0f}" if name in memory else ""
        norm = f"{norms[name]:.6g}" if name in norms else ""
        print(row.format(name, f"{p20:.1f}", f"{p50:.1f}", f"{p80:.1f}", rate, verdict, mb, norm))
        paired = {"ratio": ratio, "ratio_low": low, "ratio_high": high}
        if floor is not None:
            paired["share"] = floor / (p50 / 1e3)
        rows.append(_row(shape, device, name, "ms", p20, p50, p80) | paired)
        if name in memory:
            rows.append(_row(shape, device, name, "growth_mb", *[memory[name]] * 3))
    if device == "cuda":
        mb = scoring_growth(inputs)
        print(f"  linear_logprob under no_grad: {mb:.0f} MB")
        rows.append(_row(shape, device, "ours, log-probs only", "growth_mb", mb, mb, mb))
    elif "plain" in memory:
        share = memory["ours"] / memory["plain"]
        ok &= share <= MEMORY_GOAL
        print(f"  memory growth, ours / plain: {share:.3f} (<= {MEMORY_GOAL:.3f})")
    print(f"  goals {'met' if ok else 'NOT met'}" if device == "cpu" else "")
    append("kernels.csv", rows)
    return ok


def scoring_growth(inputs: dict) -> float:
    """Peak CUDA memory in MB that log-probs without gradients add, what a reference model costs."""
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    with torch.no_grad():
        linear_logprob(inputs["hidden"], inputs["weight"], inputs["target"])
    return (torch.cuda.max_memory_allocated() - base) / 2**20


def _row(shape: Shape, device: str, provider: str, metric: str, *values: float) -> dict:
    return {
        "op": "linear_grpo_loss",
        "peer": provider,
        "shape": str(shape),
        "dtype": "bfloat16" if device == "cuda" else "float32",
        "metric": metric,
        **dict(zip(("p20", "p50", "p80"), values, strict=False)),
        "device": device_name(device),
        "versions": versions("torch", "triton", "trl", "liger-kernel"),
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slow-rounds", type=int, default=1, help="rounds that include Liger")
    parser.add_argument("--threads", type=int, default=min(2, torch.get_num_threads()))
    parser.add_argument("--tokens", type=int, nargs="+", help="only these sizes")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("N", "V", "D"), help="this one instead")
    parser.add_argument("--sparse", action="store_true", help="sparse_tau instead, against without")
    parser.add_argument("--no-tests", action="store_true", help="numbers not fit for quoting")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if not options.no_tests and not tests_pass(SPARSE_TESTS if options.sparse else TESTS):
        return NO_NUMBERS
    if options.sparse:
        shape = Shape(*options.shape) if options.shape else _sparse.SHAPE
        _sparse.main(shape, "cuda" if torch.cuda.is_available() else "cpu", options.rounds)
        return 0
    devices = [("cpu", CPU_BENCH)]
    if torch.cuda.is_available():
        devices.append(("cuda", GPU_BENCH))
    ok = True
    for device, shapes in devices:
        for shape in [Shape(*options.shape)] if options.shape else shapes:
            if not options.tokens or shape.N in options.tokens:
                ok &= compare(shape, device, options.rounds, options.slow_rounds, options.threads)
    if not torch.cuda.is_available():
        sizes = ", ".join(str(shape.N) for shape in GPU_BENCH)
        print(f"\nGPU (tokens {sizes}; V 151936, D 1536, bf16): not measured, no CUDA device here")
    return 0 if ok else GOALS_MISSED
