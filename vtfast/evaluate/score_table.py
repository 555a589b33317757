"""Scores as a table, beside the published ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vtfast.evaluate.benchmarks import BENCHMARKS
from vtfast.evaluate.published_scores import QUESTIONS, TABLE_3, TABLE_3_COLUMNS

PUBLISHED = {
    bench: {
        task or "total": tuple(row[i] for row in TABLE_3.values())
        for i, (_, column_bench, task) in enumerate(TABLE_3_COLUMNS)
        if column_bench == bench
    }
    for bench in QUESTIONS
}
"""The paper's Table 3 by benchmark and task: (base, SFT, GRPO)."""
HEADS = ("paper's scorer", "strict", "official", "count", "base*", "SFT*", "GRPO*")
MAX_TASKS = 12
"""VSR has a task for each of its relations; scores.json has them all."""


def score_table(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """Scores of several benchmarks, in percent: a row for each benchmark and for each of its tasks."""
    lines: list[tuple[str, ...]] = [("", *HEADS)]
    for bench in [name for name in BENCHMARKS if name in scores]:
        result = scores[bench]
        strict, counts = result["strict"], result["count_by_task"]
        published = PUBLISHED.get(bench, {})
        if bench == "vsr" and set(result["by_source"]) != {"random"}:
            published = {}  # the paper's number is of the random split
        total = [_percent(x) for x in (result["total"], strict["total"], result["official"])]
        count, sizes = result["count"], BENCHMARKS[bench].sizes
        total.append(str(count) if count in sizes else f"{count} of {sizes[0]}")
        lines.append((BENCHMARKS[bench].title, *total, *_published_cells(published, "total")))
        for task, value in result["by_task"].items() if len(counts) <= MAX_TASKS else ():
            cells = [_percent(value), _percent(strict["by_task"][task]), "", str(counts[task])]
            lines.append((f"  {task}", *cells, *_published_cells(published, task)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    rows.insert(1, "-" * sum(widths, 2 * len(widths) - 2))
    return "\n".join([*rows, "* the paper's own numbers (arXiv 2503.05132, Table 3); all in percent"])


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _published_cells(published: Mapping[str, tuple[float, ...]], name: str) -> list[str]:
    return [f"{value:.2f}" for value in published.get(name, ())] or [""] * 3
