"""The types that every benchmark uses, and helpers that read one of its rows into an `Example`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vtfast.data import InvalidRow

LETTERS = "ABCDEF"
"""Of the options, in order."""


@dataclass(frozen=True)
class Example:
    """One multiple-choice question of a benchmark."""

    index: int
    """Row in the data set, from 0, over all its files in order."""
    task: str
    source: str
    question: str
    """What the model reads where the template says `{question}`."""
    options: tuple[str, ...]
    gold: int
    """Index of the right option."""
    images: tuple[bytes | Path, ...] = field(default=(), repr=False)
    """Encoded."""
    where: str = field(default="", compare=False)
    """File and row, for messages."""
    image_url: str = ""
    """Where the image can be fetched, if the data set only names it."""


@dataclass(frozen=True)
class Grade:
    """Whether the response to one example is right, by the paper's rule and by the strict one."""

    task: str
    source: str
    correct: bool
    strict_correct: bool


@dataclass(frozen=True)
class Benchmark:
    name: str
    title: str
    hub_id: str
    files: tuple[str, ...]
    """Regular expressions over the file names of a folder or hub id; the first that matches any is used."""
    columns: tuple[str, ...]
    """Columns that a file must have."""
    read: Callable[[Mapping[str, Any], int], Example]
    """(row, its index) -> example. Raises InvalidRow. Rows without images are read too: scoring needs none."""
    official_score: Callable[[Sequence[Grade]], float]
    """The benchmark's own formula over a non-empty sequence."""
    sizes: tuple[int, ...]
    """Number of questions of the whole benchmark, and of its other splits."""
    tasks: tuple[str, ...] = ()
    """Tasks in the order of tables; others follow in the order of the data."""
    has_lettered_options: bool = True
    """Whether its questions show options with letters."""
    include_row: Callable[[Mapping[str, Any]], bool] = lambda row: True
    """Whether a row belongs to the benchmark."""


def accuracy(grades: Sequence[Grade]) -> float:
    return sum(grade.correct for grade in grades) / len(grades)


def text_of(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise InvalidRow(f"{column} is {value!r}, expected text")
    return value


def options_of(row: Mapping[str, Any], column: str) -> tuple[str, ...]:
    value = row.get(column)
    tolist = getattr(value, "tolist", None)
    value = tolist() if tolist else value  # pandas has arrays
    if not isinstance(value, list | tuple) or not value or not all(isinstance(x, str) and x for x in value):
        raise InvalidRow(f"{column} is {value!r}, expected a list of texts")
    return tuple(value)


def lettered_gold(row: Mapping[str, Any], options: Sequence[str]) -> int:
    """Index of the right option from an answer such as `(C)`."""
    answer, letters = text_of(row, "answer"), LETTERS[: len(options)]
    letter = answer.strip().strip("()")
    if len(options) > len(LETTERS) or letter not in tuple(letters):
        raise InvalidRow(f"answer is {answer!r} to {len(options)} options, expected one of (A) to ({letters[-1]})")
    return letters.index(letter)


def images_of(values: Sequence[Any]) -> tuple[bytes | Path, ...]:
    """Encoded images from the `datasets` library's structs or plain bytes, and paths. Null and decoded images are left
    out: files hold no decoded ones, and scoring needs none."""
    images: list[bytes | Path] = []
    for value in values:
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            images.append(value)
        elif isinstance(value, str) and value:
            images.append(Path(value))
    return tuple(images)
