"""completions.jsonl: all of it is counted, a bounded part of it is shown.

The file may hold gigabytes. It is read twice: once to note of every line its step, its reward and its reflection words,
and once to fetch the lines that were picked.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from vtfast.report.reflection import count_words, first_step
from vtfast.report.run_folder import JsonLines, is_step, number

SHOWN = 2000
"""Completions in the page, over all runs."""
PER_STEP = 8
"""Fewer than this say little about a step: rather than that, steps are left out."""
CHARACTERS = 8_000_000
"""Text of completions in the page, over all runs; longer ones lose their middle."""
LONGEST = 20_000
"""Characters of one completion in any case."""


class Seen(NamedTuple):
    """What is remembered of a line."""

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
    """step -> number of those with a reflection word."""
    words: dict[int, Counter[str]] = field(default_factory=dict)
    """step -> word -> occurrences."""
    shown: list[dict[str, Any]] = field(default_factory=list)
    """The picked rows, cleaned, in the file's order."""
    notes: list[str] = field(default_factory=list)

    @property
    def shares(self) -> dict[int, float]:
        """step -> share of completions with a reflection word."""
        return {step: self.reflecting[step] / count for step, count in self.per_step.items()}


def read_completions(folder: Path, limit: int = SHOWN, characters: int = CHARACTERS) -> Completions:
    """`folder`/completions.jsonl; at most about `limit` of its rows and `characters` of their text are kept."""
    lines = JsonLines(folder / "completions.jsonl")
    seen = _since_rewind(_scan(lines))
    found = Completions(len(seen), notes=lines.notes())
    for step, of_step in groupby(seen, key=lambda row: row.step):
        rows = list(of_step)
        found.per_step[step] = len(rows)
        found.reflecting[step] = sum(bool(row.words) for row in rows)
        found.words[step] = sum((Counter(row.words) for row in rows), Counter())
    picked = pick(seen, limit, keep=first_step(found.shares))
    longest = min(LONGEST, characters // max(1, len(picked)))
    if picked:
        with lines.path.open("rb") as file:
            for row in picked:
                file.seek(row.offset)
                found.shown.append(_clean(json.loads(file.readline()), row, longest))
    return found


def pick(seen: Sequence[Seen], limit: int, keep: int | None = None) -> list[Seen]:
    """About `limit` rows: of evenly spaced steps each the best, the worst, some with reflection words, some others.

    The first and the last step are always among them, and so is the step `keep`.
    """
    if len(seen) <= limit:
        return list(seen)
    by_step = {step: list(rows) for step, rows in groupby(seen, key=lambda row: row.step)}
    steps = list(by_step)
    quota = max(PER_STEP, limit // len(steps))
    chosen = {*evenly(steps, max(2, limit // quota)), *([] if keep is None else [keep])}
    rows = [row for step in chosen for row in _pick_of_step(by_step[step], quota)]
    return sorted(rows, key=lambda row: row.offset)


def evenly(items: Sequence, count: int) -> list:
    """`count` of the items at even distances, the first and the last among them; all if there are no more."""
    if len(items) <= count:
        return list(items)
    if count < 2:
        return list(items[:count])
    return [items[i * (len(items) - 1) // (count - 1)] for i in range(count)]


def _pick_of_step(rows: Sequence[Seen], quota: int) -> list[Seen]:
    if len(rows) <= quota:
        return list(rows)
    best, worst = (choose(rows, key=lambda row: row.reward) for choose in (max, min))
    reflecting = evenly([row for row in rows if row.words], quota // 2)
    chosen = {row.offset: row for row in (best, worst, *reflecting)}
    others = [row for row in rows if row.offset not in chosen]
    return [*chosen.values(), *evenly(others, quota - len(chosen))]


def _scan(lines: JsonLines) -> Iterable[Seen]:
    size = lines.path.stat().st_size if lines.path.is_file() else 0
    with tqdm(total=size, desc="completions", unit="B", unit_scale=True, delay=2, leave=False) as bar:
        for offset, row in lines:
            bar.update(offset - bar.n)
            step, text = row.get("step"), row.get("completion")
            if is_step(step) and isinstance(text, str):
                yield Seen(offset, step, _rounded(row.get("reward")) or 0.0, count_words(text))
            else:
                lines.bad += 1


def _since_rewind(rows: Iterable[Seen]) -> list[Seen]:
    """A step below the one before means that the run went back: what came from there on is replaced."""
    kept: list[Seen] = []
    for row in rows:
        if kept and row.step < kept[-1].step:
            while kept and kept[-1].step >= row.step:
                kept.pop()
        kept.append(row)
    return kept


def _clean(row: dict[str, Any], seen: Seen, longest: int) -> dict[str, Any]:
    """The row's known fields with the types that the page counts on; None where a field is missing."""
    rewards = row.get("rewards")
    rewards = rewards if isinstance(rewards, dict) else {}
    return {
        "step": seen.step,
        "kind": _text(row.get("kind"), 100),
        "question": _text(row.get("question"), 2000),
        "answer": _text(row.get("answer"), 500),
        "completion": _cut(row["completion"], longest),
        "reward": _rounded(row.get("reward")),
        "rewards": {str(name): _rounded(value) for name, value in list(rewards.items())[:20]},
        "advantage": _rounded(row.get("advantage")),
        "length": _rounded(row.get("length")),
        "finish_reason": _text(row.get("finish_reason"), 40),
        "reflects": sum(seen.words.values()),
    }


def _text(value: Any, longest: int) -> str:
    return "" if value is None else _cut(str(value), longest)


def _cut(text: str, longest: int) -> str:
    """Long text without its middle."""
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters left out ...]\n{text[-half:]}"


def _rounded(value: Any) -> float | None:
    """Six digits of a number are enough to read."""
    return None if number(value) is None else float(f"{value:.6g}")
