"""Benchmarks: ask a policy their questions and score the responses; one file a benchmark, one scorer for all. Start
reading in run_benchmark.py.

evaluate(policy, bench="cvbench", data=None, limit=None, ...) -> scores    generates the responses
score("cvbench", rows, responses) -> scores                                scores given responses, without a model
"""

from typing import TYPE_CHECKING, Any

from vtfast.evaluate.benchmarks import BENCHMARKS
from vtfast.evaluate.scores import score

if TYPE_CHECKING:
    from vtfast.evaluate.run_benchmark import evaluate

__all__ = ["BENCHMARKS", "evaluate", "score"]


def __getattr__(name: str) -> Any:
    """`evaluate`, which imports torch: `vtfast eval --help` reads BENCHMARKS without it."""
    if name != "evaluate":
        raise AttributeError(name)
    from vtfast.evaluate.run_benchmark import evaluate

    return evaluate
