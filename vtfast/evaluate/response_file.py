"""The answers of one evaluation on disk: a JSONL that grows batch by batch, and scores beside it.

FOLDER/cvbench.jsonl    a row an example: index, task, source, question, options, gold, response, correct, ...
FOLDER/settings.json    by benchmark, what the answers depend on; a file is only continued under the same settings
FOLDER/scores.json      by benchmark, the scores of all rows of its file
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vtfast.evaluate.benchmark import Benchmark, Example, Grade
from vtfast.evaluate.grading import LETTERS
from vtfast.evaluate.scores import get_benchmark, grade, summarise
from vtfast.utils.errors import UserError
from vtfast.utils.files import read_json, write_atomically, write_json
from vtfast.utils.text import shorten

log = logging.getLogger("vtfast")
Row = dict[str, Any]


def make_row(benchmark: Benchmark, example: Example, response: str, tokens: int, finish_reason: str) -> Row:
    grades = grade(benchmark, example, response)
    return {
        "index": example.index,
        "task": example.task,
        "source": example.source,
        "question": example.question,
        "options": list(example.options),
        "gold": LETTERS[example.gold],  # a place among the options, whether letters were shown or not
        "images": digest(example),
        "response": response,
        "correct": grades.correct,
        "strict_correct": grades.strict_correct,
        "tokens": tokens,
        "finish_reason": finish_reason,
    }


def digest(example: Example) -> str:
    """Tells the example's images from others; empty where there are none to look at."""
    images = [image if isinstance(image, bytes) else image.read_bytes() for image in example.images]
    return hashlib.blake2b(b"|".join(images), digest_size=12).hexdigest() if images else ""


def example_of(row: Row) -> Example:
    return Example(
        row["index"], row["task"], row["source"], row["question"], tuple(row["options"]), LETTERS.index(row["gold"])
    )


@dataclass
class ResponseFile:
    """One benchmark's answers: those that are there already, and a way to add to them."""

    path: Path | None = None
    """Its JSONL; None keeps the answers in memory only."""
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path, bench: str, settings: Mapping[str, Any]) -> ResponseFile:
        """Raises UserError if the folder cannot be made, or holds answers that came about under other settings."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot be made ({error.strerror}); choose another --output_dir") from error
        path, settings_path = folder / f"{bench}.jsonl", folder / "settings.json"
        rows, whole = read_responses(path)
        known = _read_json(settings_path)
        if rows:
            _check_same(path, _settings_of(folder, bench), settings)
        else:
            write_json(settings_path, known | {bench: dict(settings)})
        if path.exists() and whole < path.stat().st_size:
            log.warning("%s: the last line was cut off; its example is asked again", path)
            os.truncate(path, whole)
        return cls(path, rows)

    def left(self, examples: Sequence[Example]) -> list[Example]:
        """The examples without an answer. Raises UserError if an answered one is not the example that it was."""
        answered = {row["index"]: row for row in self.rows}
        for example in examples:
            row = answered.get(example.index)
            if row and _asked(row) != (example.question, example.options, LETTERS[example.gold], digest(example)):
                raise UserError(
                    f"{self.path}: row {example.index} of the data is another question than the one answered there."
                    " Remove the file, or choose another --output_dir"
                )
        return [example for example in examples if example.index not in answered]

    def add(self, rows: Sequence[Row], write: bool = True) -> None:
        """`write`: whether this process is the one that writes them down."""
        self.rows += rows
        if self.path and write:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)


def _asked(row: Row) -> tuple:
    return row["question"], tuple(row["options"]), row["gold"], row["images"]


def read_responses(path: Path) -> tuple[list[Row], int]:
    """-> rows, and the bytes that they take up: less than the file where its last line was cut off.

    Raises:
        UserError: a line before the last one is damaged.
    """
    if not path.exists():
        return [], 0
    rows: dict[int, Row] = {}
    whole = 0
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
            _check_types(row)
            example = example_of(row)
            if example.index in rows:
                raise ValueError("a second answer to the same question")
            if example.gold >= len(example.options):
                raise ValueError("no such option")
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: damaged ({error}). Remove the line, or the file") from error
        rows[row["index"]] = row
        whole += len(line)
    return list(rows.values()), whole


TYPES = {
    "index": int,
    "task": str,
    "source": str,
    "question": str,
    "options": list,
    "gold": str,
    "images": str,
    "response": str,
    "correct": bool,
    "strict_correct": bool,
    "tokens": int,
    "finish_reason": str,
}
"""Of the values of a row."""


def _check_types(row: Any) -> None:
    """Raises ValueError for a row that `make_row` would not have made."""
    if not isinstance(row, dict):
        raise ValueError(f"not a row of named values but {type(row).__name__}")
    for name, kind in TYPES.items():
        if type(row.get(name)) is not kind:
            raise ValueError(f"{name}: {shorten(repr(row.get(name)), 60)} is no {kind.__name__}")
    if not all(isinstance(option, str) for option in row["options"]):
        raise ValueError(f"options: {shorten(repr(row['options']), 60)} are not all texts")


def grade_rows(bench: str, rows: Sequence[Row]) -> list[Grade]:
    """An answer file's rows, grades anew."""
    benchmark = get_benchmark(bench)
    return [grade(benchmark, example_of(row), row["response"]) for row in rows]


def scores_of(bench: str, rows: Sequence[Row], grades: Sequence[Grade] | None = None) -> dict[str, Any]:
    """Scores of an answer file's rows, with the mean number of tokens and the share that was cut off. `grades`: what
    `grade_rows` gives, where that is at hand."""
    scores = summarise(get_benchmark(bench), grade_rows(bench, rows) if grades is None else grades)
    return scores | {
        "mean_tokens": sum(row["tokens"] for row in rows) / len(rows),
        "truncated": sum(row["finish_reason"] == "length" for row in rows) / len(rows),
    }


def write_scores(folder: Path, bench: str, *, model: str, step: int | None) -> dict[str, Any]:
    """Score a folder's answers to one benchmark, put the result into its scores.json, and return it.

    Raises:
        UserError: no answers, or damaged ones.
    """
    rows, _ = read_responses(folder / f"{bench}.jsonl")
    grades = grade_rows(bench, rows)
    _mend(folder / f"{bench}.jsonl", rows, grades)
    settings = _settings_of(folder, bench)
    about = {"model": model, "step": step} | {
        name: settings.get(name) for name in ("template", "min_pixels", "max_pixels")
    }
    scores = scores_of(bench, rows, grades) | about
    path = folder / "scores.json"
    write_json(path, _read_json(path) | {bench: scores})
    return scores


def _mend(path: Path, rows: Sequence[Row], grades: Sequence[Grade]) -> None:
    """What the rows say of themselves follows their responses, which a user may have mended."""
    changed = False
    for row, one in zip(rows, grades, strict=True):
        now = {"correct": one.correct, "strict_correct": one.strict_correct}
        changed |= now != {name: row[name] for name in now}
        row.update(now)
    if changed:
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def _settings_of(folder: Path, bench: str) -> dict[str, Any]:
    """What the answers to a benchmark came about under; empty where that is not known."""
    path = folder / "settings.json"
    settings = _read_json(path).get(bench, {})
    if not isinstance(settings, dict):
        raise UserError(f"{path}: {bench}: a mapping is wanted, not {shorten(repr(settings), 60)}")
    return settings


def _check_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        name = changed[0]
        raise UserError(
            f"{path}: holds answers under other settings ({name}: {shorten(repr(before.get(name)), 60)} there,"
            f" {shorten(repr(now[name]), 60)} now). Remove the file, or choose another --output_dir"
        )


def _read_json(path: Path) -> dict[str, Any]:
    """A mapping from a JSON file; empty where there is none."""
    return read_json(path) if path.exists() else {}
