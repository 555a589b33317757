"""The responses of one evaluation on disk: a JSONL that grows batch by batch.

FOLDER/cvbench.jsonl    a row an example: index, task, source, question, options, gold, response, correct, ...
FOLDER/settings.json    by benchmark, what the responses depend on; a file is only continued under the same settings
FOLDER/scores.json      by benchmark, the scores of all rows of its file (`vtfast.evaluate.scores`)
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

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from vtfast.evaluate.benchmark import LETTERS, Benchmark, Example, Grade
from vtfast.evaluate.grading import grade
from vtfast.utils.errors import UserError
from vtfast.utils.files import read_json, write_atomically, write_json
from vtfast.utils.text import shorten

log = logging.getLogger("vtfast")


Row = dict[str, Any]
"""With the fields of `_Fields`."""


class _Fields(TypedDict):
    index: int
    task: str
    source: str
    question: str
    options: list[str]
    gold: str
    """Letter of the right option, whether letters were shown or not."""
    images: str
    """`image_digest` of the example."""
    response: str
    correct: bool
    strict_correct: bool
    tokens: int
    finish_reason: str


_FIELDS = TypeAdapter(_Fields)


def make_row(benchmark: Benchmark, example: Example, response: str, tokens: int, finish_reason: str) -> Row:
    graded = grade(benchmark, example, response)
    return {
        "index": example.index,
        "task": example.task,
        "source": example.source,
        "question": example.question,
        "options": list(example.options),
        "gold": LETTERS[example.gold],
        "images": image_digest(example),
        "response": response,
        "correct": graded.correct,
        "strict_correct": graded.strict_correct,
        "tokens": tokens,
        "finish_reason": finish_reason,
    }


def image_digest(example: Example) -> str:
    """Hash of the example's images; empty without images."""
    images = [image if isinstance(image, bytes) else image.read_bytes() for image in example.images]
    return hashlib.blake2b(b"|".join(images), digest_size=12).hexdigest() if images else ""


def regrade(benchmark: Benchmark, row: Row) -> Grade:
    options, gold = tuple(row["options"]), LETTERS.index(row["gold"])
    example = Example(row["index"], row["task"], row["source"], row["question"], options, gold)
    return grade(benchmark, example, row["response"])


@dataclass
class ResponseFile:
    """One benchmark's responses: those of earlier calls, and a way to add to them."""

    path: Path | None = None
    """Its JSONL; None keeps the responses in memory only."""
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path, bench: str, settings: Mapping[str, Any]) -> ResponseFile:
        """Raises UserError if the folder holds responses generated under other settings."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{bench}.jsonl"
        rows, complete_bytes = read_responses(path)
        if rows:
            _check_same(path, generation_settings(folder, bench), settings)
        else:
            write_json(folder / "settings.json", _read_settings(folder) | {bench: dict(settings)})
        if path.exists() and complete_bytes < path.stat().st_size:
            log.warning("%s: the last line was cut off; its question is asked again", path)
            os.truncate(path, complete_bytes)
        return cls(path, rows)

    def unanswered(self, examples: Sequence[Example]) -> list[Example]:
        """The examples without a response. Raises UserError if the question of an answered example has changed."""
        rows = {row["index"]: row for row in self.rows}
        for example in examples:
            row = rows.get(example.index)
            if row and (row["question"], tuple(row["options"]), row["gold"], row["images"]) != (
                example.question,
                example.options,
                LETTERS[example.gold],
                image_digest(example),
            ):
                raise UserError(
                    f"{self.path}: row {example.index} of the data is not the question that was answered."
                    " Remove the file, or choose another --output_dir"
                )
        return [example for example in examples if example.index not in rows]

    def add(self, rows: Sequence[Row], write: bool = True) -> None:
        """`write`: whether this process is the one that writes the file."""
        self.rows += rows
        if self.path and write:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)


def read_responses(path: Path) -> tuple[list[Row], int]:
    """-> rows, and the bytes of their lines: less than the file where a killed run cut the last line off.

    Raises:
        UserError: a line before the last one is damaged. A user may have edited the file.
    """
    rows: dict[int, Row] = {}
    complete_bytes = 0
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            break
        try:
            row: Row = {**_FIELDS.validate_json(line, strict=True)}
            row["options"][list(LETTERS).index(row["gold"])]
        except (ValueError, IndexError) as error:
            reason = shorten(" ".join(str(error).split()))
            raise UserError(f"{path}, line {number}: damaged ({reason}). Remove the line, or the file") from error
        rows[row["index"]] = row
        complete_bytes += len(line)
    return list(rows.values()), complete_bytes


def update_grades(path: Path, benchmark: Benchmark, rows: Sequence[Row]) -> None:
    """Write the rows with `correct` and `strict_correct` as they are graded now, if that changes any."""
    graded = [(row, regrade(benchmark, row)) for row in rows]
    now = [{**row, "correct": grade.correct, "strict_correct": grade.strict_correct} for row, grade in graded]
    if now != rows:
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in now))


def generation_settings(folder: Path, bench: str) -> dict[str, Any]:
    """The settings that the responses to a benchmark were generated under; empty if unknown."""
    settings = _read_settings(folder).get(bench)
    return settings if isinstance(settings, dict) else {}


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / "settings.json"
    return read_json(path) if path.exists() else {}


def _check_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name in now:
        if before.get(name) != now[name]:
            then, value = (shorten(repr(settings.get(name)), 60) for settings in (before, now))
            raise UserError(
                f"{path}: holds responses under other settings ({name}: {then} there, {value} now)."
                " Remove the file, or choose another --output_dir"
            )
