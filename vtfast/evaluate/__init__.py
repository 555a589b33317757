"""Judging a policy on questions that it was not trained on: one file a benchmark, one scorer for all.

evaluate(policy, bench="cvbench", data=None, limit=None, ...) -> scores    asks the questions
score("cvbench", rows, responses) -> scores                                judges responses, without a model
"""

from vtfast.evaluate.run_benchmark import evaluate
from vtfast.evaluate.scores import BENCHMARKS, score

__all__ = ["BENCHMARKS", "evaluate", "score"]
