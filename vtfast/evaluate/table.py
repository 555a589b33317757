"""Scores as a table, beside the published ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vtfast.evaluate.scores import BENCHMARKS

# Table 3 of arXiv 2503.05132, Qwen2-VL-2B, in percent: base, SFT on SAT, GRPO. "total" is the paper's Total or Average.
# The base model's Depth reads 0.16 in some copies; only 10.16 gives its total.
PUBLISHED: dict[str, dict[str, tuple[float, float, float]]] = {
    "cvbench": {
        "total": (31.38, 57.84, 59.47),
        "Count": (54.69, 60.02, 59.64),
        "Relation": (22.46, 68.92, 66.76),
        "Depth": (10.16, 55.00, 54.16),
        "Distance": (31.66, 45.83, 56.66),
    },
    "blink": {
        "total": (6.74, 52.43, 53.18),
        "Relative_Depth": (13.70, 58.06, 50.80),
        "Spatial_Relation": (0.69, 47.55, 55.94),
    },
    "vsr": {"total": (0.0, 35.80, 62.32)},
}
HEADS = ("paper's scorer", "strict", "official", "count", "base*", "SFT*", "GRPO*")
MOST_TASKS = 12
"""VSR has a task for each of its relations; such tables are left to scores.json."""


def score_table(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """Scores of several benchmarks, in percent: a row a benchmark and a row for each of its tasks."""
    lines = [("", *HEADS)]
    for bench in [name for name in BENCHMARKS if name in scores]:
        result = scores[bench]
        strict, counts = result["strict"], result["count_by_task"]
        published = PUBLISHED.get(bench, {})
        if bench == "vsr" and set(result["by_source"]) != {"random"}:
            published = {}  # the paper's number is of the random split
        total = [_percent(x) for x in (result["total"], strict["total"], result["official"])]
        count, sizes = result["count"], BENCHMARKS[bench].sizes
        total.append(str(count) if count in sizes else f"{count} of {sizes[0]}")
        lines.append((BENCHMARKS[bench].title, *total, *_of_paper(published, "total")))
        for task, value in result["by_task"].items() if len(counts) <= MOST_TASKS else ():
            cells = [_percent(value), _percent(strict["by_task"][task]), "", str(counts[task])]
            lines.append((f"  {task}", *cells, *_of_paper(published, task)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    rows.insert(1, "-" * sum(widths, 2 * len(widths) - 2))
    return "\n".join(
        [*rows, "* the paper's own numbers (arXiv 2503.05132, Table 3); all in percent"]
    )


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _of_paper(published: Mapping[str, tuple[float, ...]], name: str) -> list[str]:
    return [f"{value:.2f}" for value in published.get(name, ())] or [""] * 3
