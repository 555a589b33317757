"""The tables of the page as JSON values: a caption, headings, rows of text. An unknown value is an empty cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vtfast.evaluate import published_scores
from vtfast.report.read_run import Run, number
from vtfast.utils.files import step_of

Table = dict[str, Any]

LAST = 10
"""Number of last steps over which a run's result is averaged."""
OVERVIEW = {
    "reward": ("reward", "{:.2f}"),
    "accuracy": ("rewards/accuracy", "{:.0%}"),
    "format": ("rewards/format", "{:.0%}"),
    "tokens/completion": ("completions/mean_length", "{:,.0f}"),
    "KL": ("kl", "{:.3g}"),
    "tokens/s": ("tokens_per_second", "{:,.0f}"),
}
"""Heading -> key in metrics.jsonl, format."""
FROZEN = {"vision": "vision encoder", "language": "language model", "merger": "merger", "embeddings": "embeddings"}


def overview(runs: Sequence[Run]) -> Table:
    """The result of each run: means over its last steps."""
    rows = []
    for run in runs:
        cells = [_at_the_end(run, key, form) for key, form in OVERVIEW.values()]
        rows.append({"label": run.name, "note": run.status, "cells": [*cells, _duration(run)]})
    return {
        "caption": "At the end of training",
        "note": f"On training questions, means over the last {LAST} steps.",
        "columns": [*OVERVIEW, "time trained"],
        "rows": rows,
    }


def held_out(runs: Sequence[Run]) -> list[Table]:
    """Results before and after training by kind of question: one table per run that has them."""
    tables = []
    for run in runs:
        if run.held_out is None:
            continue
        before, after = run.held_out["before"]["scores"], run.held_out["after"]["scores"]
        modes = [mode for mode in ("sampled", "greedy") if mode in before and mode in after]
        parts = [(mode, i, name) for i, name in enumerate(("accuracy", "format")) for mode in modes]
        kinds = [kind for kind in after[modes[0]] if kind in before[modes[0]]] if modes else []
        tables.append(
            {
                "caption": "Held-out questions" + (f": {run.name}" if len(runs) > 1 else ""),
                "note": f"{run.held_out['after']['count']:,} questions, before and after training.",
                "columns": [f"{name}, {mode}" for mode, _, name in parts],
                "rows": [
                    {
                        "label": kind,
                        "cells": [f"{before[mode][kind][i]:.2f} → {after[mode][kind][i]:.2f}" for mode, i, _ in parts],
                    }
                    for kind in kinds
                ],
            }
        )
    return tables


def differing_settings(runs: Sequence[Run]) -> Table:
    """The settings in which the runs differ, except the output folder."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key != "output_dir")
    texts = {key: [_text(run.config[key]) if key in run.config else "" for run in runs] for key in keys}
    return {
        "caption": "Settings that differ",
        "note": "Every other setting is the same in all runs.",
        "columns": [run.name for run in runs],
        "rows": [{"label": key, "cells": cells} for key, cells in texts.items() if len(set(cells)) > 1],
    }


def settings(run: Run) -> Table:
    """All settings of a run."""
    rows = [{"label": key, "cells": [_text(value)]} for key, value in run.config.items()]
    return {"caption": run.name, "columns": ["value"], "rows": rows}


def table_3(runs: Sequence[Run]) -> Table:
    """The study's main results, and below them the newest evaluation of each run; for a single run also the first."""
    columns = published_scores.TABLE_3_COLUMNS
    rows = _paper_rows(published_scores.TABLE_3)
    for run in runs:
        first = list(run.evaluations)[:1] if len(runs) == 1 else []
        rows += _run_rows(run, list(dict.fromkeys([*first, *_newest(run)])), run.name, columns)
    return {
        "caption": "Spatial benchmarks (layout of Table 3)",
        "note": "Accuracy in %. Totals are shares of all questions, as the study counts them.",
        "columns": [heading for heading, _, _ in columns],
        "rows": rows,
    }


def table_5(runs: Sequence[Run]) -> Table:
    """The study's results by frozen parts, and below them the newest evaluation of each run."""
    columns = published_scores.TABLE_5_COLUMNS
    rows = _paper_rows(published_scores.TABLE_5)
    for run in runs:
        rows += _run_rows(run, _newest(run), f"{frozen(run)}: {run.name}", columns)
    return {
        "caption": "Frozen parts (layout of Table 5)",
        "note": "Accuracy on CV-Bench in %.",
        "columns": [heading for heading, _, _ in columns],
        "rows": rows,
    }


def frozen(run: Run) -> str:
    """The `freeze` setting in words."""
    parts = run.config.get("freeze") or []
    parts = parts if isinstance(parts, list) else [parts]
    names = [FROZEN.get(str(part), str(part)) for part in parts]
    return f"{' and '.join(names)} frozen" if names else "nothing frozen"


def _paper_rows(table: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    return [
        {"label": name, "paper": True, "cells": [f"{value:.2f}" for value in cells]} for name, cells in table.items()
    ]


def _run_rows(run: Run, names: Sequence[str], label: str, columns: Sequence[tuple]) -> list[dict[str, Any]]:
    """A row for each of these evaluations, or one that says that there is none."""
    if not names:
        return [{"label": label, "note": "not evaluated", "cells": [""] * len(columns)}]
    return [_run_row(run, name, label, columns) for name in names]


def _run_row(run: Run, name: str, label: str, columns: Sequence[tuple]) -> dict[str, Any]:
    scores = run.evaluations[name]
    step = step_of(name)
    notes = [name if step is None else f"step {step:,}"]
    for bench in dict.fromkeys(bench for _, bench, _ in columns):
        count, full = number(scores.get(bench, {}).get("count")), published_scores.QUESTIONS[bench]
        if count is not None and count != full:
            notes.append(f"{count:,} of {full:,} {published_scores.TITLES[bench]} questions")
    cells = [_accuracy(scores.get(bench), task) for _, bench, task in columns]
    return {"label": label, "note": "; ".join(notes), "cells": cells}


def _newest(run: Run) -> list[str]:
    """The name of the latest step's evaluation, or of the last by name if no folder names a step. At most one."""
    names = list(run.evaluations)
    return ([name for name in names if step_of(name) is not None] or names)[-1:]


def _accuracy(score: dict[str, Any] | None, task: str | None) -> str:
    """Accuracy in % with two decimals, as the study prints it. Spaces and underscores in task names are equal."""
    if score is None:
        return ""
    if task is None:
        value = score.get("total")
    else:
        by_task = score.get("by_task")
        by_task = by_task if isinstance(by_task, dict) else {}
        value = {str(key).replace(" ", "_"): share for key, share in by_task.items()}.get(task)
    share = number(value)
    return "" if share is None else f"{100 * share:.2f}"


def _at_the_end(run: Run, key: str, form: str) -> str:
    values = [row[key] for row in run.metrics[-LAST:] if row.get(key) is not None]
    return form.format(sum(values) / len(values)) if values else ""


def _duration(run: Run) -> str:
    seconds = sum(row.get("time/step") or 0.0 for row in run.metrics)
    if not seconds:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
