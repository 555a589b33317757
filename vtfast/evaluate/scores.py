"""Graded responses -> the accuracies that are reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vtfast.data import InvalidRow
from vtfast.evaluate.benchmark import Benchmark, Grade, accuracy
from vtfast.evaluate.benchmarks import get_benchmark
from vtfast.evaluate.grading import grade
from vtfast.evaluate.response_file import Row, generation_settings, read_responses, regrade, update_grades
from vtfast.utils.errors import UserError, error_prefix
from vtfast.utils.files import read_json, write_json


def score(bench: str, rows: Sequence[Mapping[str, Any]], responses: Sequence[str]) -> dict[str, Any]:
    """Scores of responses to rows of a data set, in its own schema. Images are not looked at.

    Returns:
        `total` (micro average by the paper's scorer, the number in its tables), `by_task`, `by_source`, `official`
        (the benchmark's own formula on the same grades, from its module in `vtfast/evaluate/benchmarks/`), `count`,
        `count_by_task`, and the strict scorer's `total` and `by_task` under `strict`. All accuracies are in [0, 1].

    Raises:
        UserError: another number of responses than rows, no rows, or a row or response that cannot be read.
    """
    benchmark = get_benchmark(bench)
    if len(rows) != len(responses):
        raise UserError(f"{bench}: {len(responses)} responses for {len(rows)} rows")
    grades = []
    for index, (row, response) in enumerate(zip(rows, responses, strict=True)):
        with error_prefix(f"{bench}, row {index}"):
            if not isinstance(response, str):
                raise InvalidRow(f"response is {response!r}, expected text")
            grades.append(grade(benchmark, benchmark.read(row, index), response))
    return summarise(benchmark, grades)


def summarise(benchmark: Benchmark, grades: Sequence[Grade]) -> dict[str, Any]:
    """The result of `score`. Raises UserError for an empty sequence."""
    if not grades:
        raise UserError(f"{benchmark.name}: no responses to score")
    present = dict.fromkeys(grade.task for grade in grades)
    tasks = [task for task in benchmark.tasks if task in present]
    tasks += [task for task in present if task not in tasks]
    by_task = {task: [grade for grade in grades if grade.task == task] for task in tasks}
    sources = sorted({grade.source for grade in grades})
    return {
        "total": accuracy(grades),
        "official": benchmark.official_score(grades),
        "count": len(grades),
        "by_task": {task: accuracy(part) for task, part in by_task.items()},
        "by_source": {name: accuracy([grade for grade in grades if grade.source == name]) for name in sources},
        "count_by_task": {task: len(part) for task, part in by_task.items()},
        "strict": {
            "total": _strict_accuracy(grades),
            "by_task": {task: _strict_accuracy(part) for task, part in by_task.items()},
        },
    }


def _strict_accuracy(grades: Sequence[Grade]) -> float:
    return sum(grade.strict_correct for grade in grades) / len(grades)


def score_rows(bench: str, rows: Sequence[Row]) -> dict[str, Any]:
    """The result of `score` for the rows of a response file, with `mean_tokens` and `truncated`: the share of responses
    that reached the token limit."""
    benchmark = get_benchmark(bench)
    scores = summarise(benchmark, [regrade(benchmark, row) for row in rows])
    return scores | {
        "mean_tokens": sum(row["tokens"] for row in rows) / len(rows),
        "truncated": sum(row["finish_reason"] == "length" for row in rows) / len(rows),
    }


def write_scores(folder: Path, bench: str, *, model: str, step: int | None) -> dict[str, Any]:
    """Grade a folder's responses to one benchmark again, write the scores into its scores.json, and return them.

    Raises:
        UserError: no responses, or a damaged file.
    """
    responses = folder / f"{bench}.jsonl"
    rows, _ = read_responses(responses)
    settings = generation_settings(folder, bench)
    scores = (
        score_rows(bench, rows)
        | {"model": model, "step": step}
        | {name: settings.get(name) for name in ("template", "min_pixels", "max_pixels")}
    )
    update_grades(responses, get_benchmark(bench), rows)
    path = folder / "scores.json"
    write_json(path, (read_json(path) if path.exists() else {}) | {bench: scores})
    return scores
