"""completions.jsonl: all completions are counted, a bounded number of them is shown.

The file may hold gigabytes. It is read twice: once for the step, reward and reflection words of every line, and once
for the lines that were picked.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

from vtfast.report.read_run import JsonLinesReader, is_step, number
from vtfast.report.reflection import count_words, first_step

SHOWN = 2000
"""Most completions on the page, over all runs."""
PER_STEP = 8
"""Fewest completions of a step that is shown; if there are too many steps for that, some are left out."""
CHARACTERS = 8_000_000
"""Most characters of completions on the page, over all runs; the middle of longer ones is left out."""
LONGEST = 20_000
"""Most characters of one completion."""
T = TypeVar("T")


class LineSummary(NamedTuple):
    """What the first reading keeps of a line."""

    offset: int
    step: int
    reward: float
    words: dict[str, int]


@dataclass
class Completions:
    """The completions of one run."""

    total: int = 0
    per_step: dict[int, int] = field(default_factory=dict)
    """step -> number of completions."""
    reflecting: dict[int, int] = field(default_factory=dict)
    """step -> number of completions with a reflection word."""
    words: dict[int, Counter[str]] = field(default_factory=dict)
    """step -> word -> occurrences."""
    shown: list[dict[str, Any]] = field(default_factory=list)
    """The picked rows in the file's order, with the types that the page expects."""
    notes: list[str] = field(default_factory=list)

    @property
    def shares(self) -> dict[int, float]:
        """step -> share of completions with a reflection word."""
        return {step: self.reflecting[step] / count for step, count in self.per_step.items()}


def read_completions(folder: Path, limit: int = SHOWN, characters: int = CHARACTERS) -> Completions:
    """Read `folder`/completions.jsonl and pick at most about `limit` rows with `characters` of text to show."""
    lines = JsonLinesReader(folder / "completions.jsonl")
    summaries = _drop_repeated(_scan(lines))
    completions = Completions(len(summaries), notes=lines.notes())
    for step, of_step in groupby(summaries, key=lambda row: row.step):
        rows = list(of_step)
        completions.per_step[step] = len(rows)
        completions.reflecting[step] = sum(bool(row.words) for row in rows)
        completions.words[step] = sum((Counter(row.words) for row in rows), Counter())
    picked = pick(summaries, limit, keep=first_step(completions.shares))
    longest = min(LONGEST, characters // max(1, len(picked)))
    if picked:
        with lines.path.open("rb") as file:
            for row in picked:
                file.seek(row.offset)
                completions.shown.append(_clean(json.loads(file.readline()), row, longest))
    return completions


def pick(summaries: Sequence[LineSummary], limit: int, keep: int | None = None) -> list[LineSummary]:
    """About `limit` rows of evenly spaced steps: of each the best, the worst, some with reflection words, some others.

    The first step, the last one and `keep` are always among them.
    """
    if len(summaries) <= limit:
        return list(summaries)
    by_step = {step: list(rows) for step, rows in groupby(summaries, key=lambda row: row.step)}
    steps = list(by_step)
    quota = max(PER_STEP, limit // len(steps))
    chosen = {*evenly(steps, max(2, limit // quota)), *([] if keep is None else [keep])}
    rows = [row for step in chosen for row in _pick_of_step(by_step[step], quota)]
    return sorted(rows, key=lambda row: row.offset)


def evenly(items: Sequence[T], count: int) -> list[T]:
    """`count` (2 or more) evenly spaced items, the first and the last included; all items if there are fewer."""
    if len(items) <= count:
        return list(items)
    return [items[i * (len(items) - 1) // (count - 1)] for i in range(count)]


def _pick_of_step(rows: Sequence[LineSummary], quota: int) -> list[LineSummary]:
    if len(rows) <= quota:
        return list(rows)
    best, worst = (choose(rows, key=lambda row: row.reward) for choose in (max, min))
    reflecting = evenly([row for row in rows if row.words], quota // 2)
    chosen = {row.offset: row for row in (best, worst, *reflecting)}
    others = [row for row in rows if row.offset not in chosen]
    return [*chosen.values(), *evenly(others, quota - len(chosen))]


def _scan(lines: JsonLinesReader) -> Iterable[LineSummary]:
    size = lines.path.stat().st_size if lines.path.is_file() else 0
    with tqdm(total=size, desc="completions", unit="B", unit_scale=True, delay=2, leave=False) as bar:
        for offset, row in lines:
            bar.update(offset - bar.n)
            step, text = row.get("step"), row.get("completion")
            if is_step(step) and isinstance(text, str):
                yield LineSummary(offset, step, _rounded(row.get("reward")) or 0.0, count_words(text))
            else:
                lines.bad += 1


def _drop_repeated(rows: Iterable[LineSummary]) -> list[LineSummary]:
    """Drop the older rows of a run that went back: a step below the one before replaces all rows from there on."""
    newest: list[LineSummary] = []
    for row in rows:
        if newest and row.step < newest[-1].step:
            while newest and newest[-1].step >= row.step:
                newest.pop()
        newest.append(row)
    return newest


def _clean(row: dict[str, Any], summary: LineSummary, longest: int) -> dict[str, Any]:
    """The row's known fields with the types that the page expects; None or empty if a field is missing."""
    rewards = row.get("rewards")
    rewards = rewards if isinstance(rewards, dict) else {}
    return {
        "step": summary.step,
        "kind": _text(row.get("kind"), 100),
        "question": _text(row.get("question"), 2000),
        "answer": _text(row.get("answer"), 500),
        "completion": _cut(row["completion"], longest),
        "reward": _rounded(row.get("reward")),
        "rewards": {str(name): _rounded(value) for name, value in list(rewards.items())[:20]},
        "advantage": _rounded(row.get("advantage")),
        "length": _rounded(row.get("length")),
        "finish_reason": _text(row.get("finish_reason"), 40),
        "reflects": sum(summary.words.values()),
    }


def _text(value: Any, longest: int) -> str:
    return "" if value is None else _cut(str(value), longest)


def _cut(text: str, longest: int) -> str:
    """Text without its middle if it is too long."""
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters left out ...]\n{text[-half:]}"


def _rounded(value: Any) -> float | None:
    """A number with six digits; None for anything else."""
    return None if number(value) is None else float(f"{value:.6g}")
