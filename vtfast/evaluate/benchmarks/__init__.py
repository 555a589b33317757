"""One file a benchmark: its rows, its prompts and its official score. `cvbench.py` is a short one."""

from vtfast.evaluate.benchmark import Benchmark
from vtfast.evaluate.benchmarks import blink, cvbench, sat, vsr
from vtfast.utils.errors import UserError

BENCHMARKS: dict[str, Benchmark] = {module.BENCHMARK.name: module.BENCHMARK for module in (cvbench, blink, vsr, sat)}
"""By the name that `vtfast eval --bench` takes, in the order of tables; the first is the default."""


def get_benchmark(name: str) -> Benchmark:
    if name not in BENCHMARKS:
        raise UserError(f"unknown benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]
