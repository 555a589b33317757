"""Grade answers -> the numbers that are reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vtfast.data import InvalidRow
from vtfast.evaluate.benchmark import Benchmark, Example, Grade, accuracy
from vtfast.evaluate.benchmarks import blink, cvbench, sat, vsr
from vtfast.evaluate.grading import paper_correct, strict_correct
from vtfast.utils.errors import UserError

BENCHMARKS: dict[str, Benchmark] = {module.BENCHMARK.name: module.BENCHMARK for module in (cvbench, blink, vsr, sat)}


def get_benchmark(name: str) -> Benchmark:
    if name not in BENCHMARKS:
        raise UserError(f"unknown benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def score(bench: str, rows: Sequence[Mapping[str, Any]], responses: Sequence[str]) -> dict[str, Any]:
    """Scores of responses to rows of a data set, in its own schema. Images are not looked at.

    Returns:
        `total` (micro average by the paper's scorer, the number in its tables), `by_task`, `by_source`, `official`
        (the benchmark's own formula on the same judgements), `count`, `count_by_task`, and the strict scorer's `total`
        and `by_task` under `strict`. All accuracies are in [0, 1].

        `official` of CV-Bench is ((ADE20K + COCO) / 2 + Omni3D) / 2, where a source or a half that has no rows is left
        out of its mean; of BLINK the mean over the tasks present; of VSR and SAT the plain accuracy.

    Raises:
        UserError: another number of responses than rows, no rows, or a row that cannot be read.
    """
    benchmark = get_benchmark(bench)
    if len(rows) != len(responses):
        raise UserError(f"{bench}: {len(responses)} responses for {len(rows)} rows")
    grades = []
    for index, (row, response) in enumerate(zip(rows, responses, strict=True)):
        if not isinstance(response, str):
            raise UserError(f"{bench}, response {index}: not text but {type(response).__name__}")
        try:
            grades.append(grade(benchmark, benchmark.read(row, index), response))
        except InvalidRow as error:
            raise UserError(f"{bench}, row {index}: {error}") from error
    return summarise(benchmark, grades)


def grade(benchmark: Benchmark, example: Example, response: str) -> Grade:
    question = example.options, example.gold, benchmark.letters
    return Grade(example.task, example.source, paper_correct(response, *question), strict_correct(response, *question))


def summarise(benchmark: Benchmark, grades: Sequence[Grade]) -> dict[str, Any]:
    """The result of `score`. Raises UserError where there is nothing to average."""
    if not grades:
        raise UserError(f"{benchmark.name}: no answers to score")
    seen = dict.fromkeys(one.task for one in grades)
    tasks = [task for task in benchmark.tasks if task in seen]
    tasks += [task for task in seen if task not in tasks]
    by_task = {task: [one for one in grades if one.task == task] for task in tasks}
    sources = sorted({one.source for one in grades})
    return {
        "total": accuracy(grades),
        "official": benchmark.official(grades),
        "count": len(grades),
        "by_task": {task: accuracy(part) for task, part in by_task.items()},
        "by_source": {name: accuracy([one for one in grades if one.source == name]) for name in sources},
        "count_by_task": {task: len(part) for task, part in by_task.items()},
        "strict": {"total": _strict(grades), "by_task": {task: _strict(part) for task, part in by_task.items()}},
    }


def _strict(grades: Sequence[Grade]) -> float:
    return sum(one.strict_correct for one in grades) / len(grades)
