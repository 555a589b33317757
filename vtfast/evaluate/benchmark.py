"""What every benchmark is made of: examples, and how one of its rows becomes an example."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vtfast.data import InvalidRow
from vtfast.evaluate.grading import LETTERS


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
    """Place of the right option."""
    images: tuple[bytes | Path, ...] = field(default=(), repr=False)
    """Encoded."""
    where: str = field(default="", compare=False)
    """File and row, for messages."""
    link: str = ""
    """Where the image can be fetched, if the data set only names it."""


@dataclass(frozen=True)
class Grade:
    """An example's answer after both scorers."""

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
    """Regular expressions over file names of a folder or hub id; the first that finds any is used."""
    columns: tuple[str, ...]
    """What a file must have."""
    read: Callable[[Mapping[str, Any], int], Example]
    """Row and its number -> example. Raises InvalidRow. Rows without images are read too: scoring needs none."""
    official: Callable[[Sequence[Grade]], float]
    """The benchmark's own formula over a non-empty sequence."""
    sizes: tuple[int, ...]
    """Questions of the whole benchmark, and of its other splits."""
    tasks: tuple[str, ...] = ()
    """Tasks in the order of tables; others follow in the order of the data."""
    letters: bool = True
    """Whether its questions show options with letters."""
    use: Callable[[Mapping[str, Any]], bool] = lambda row: True
    """Which rows are asked at all."""


def accuracy(grades: Sequence[Grade]) -> float:
    return sum(one.correct for one in grades) / len(grades)


def text_of(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise InvalidRow(f"{column} is {value!r}, and text is wanted")
    return value


def options_of(row: Mapping[str, Any], column: str) -> tuple[str, ...]:
    value = row.get(column)
    value = value.tolist() if hasattr(value, "tolist") else value  # pandas hands over arrays
    if not isinstance(value, list | tuple) or not value or not all(isinstance(x, str) and x for x in value):
        raise InvalidRow(f"{column} is {value!r}, and a list of texts is wanted")
    return tuple(value)


def lettered_gold(row: Mapping[str, Any], options: Sequence[str]) -> int:
    """Place of the right option from an answer such as `(C)`."""
    answer = text_of(row, "answer")
    if len(options) > len(LETTERS):
        raise InvalidRow(f"{len(options)} options, and letters go to {LETTERS[-1]}")
    place = LETTERS.find(answer.strip().strip("()"))
    if len(answer.strip().strip("()")) != 1 or not 0 <= place < len(options):
        raise InvalidRow(f"answer is {answer!r}, and one of (A) to ({LETTERS[len(options) - 1]}) is wanted")
    return place


def images_of(values: Sequence[Any]) -> tuple[bytes | Path, ...]:
    """Encoded images out of the `datasets` library's structs or plain bytes, and paths. Decoded ones are left out with
    the null ones: files hold none, and scoring needs none."""
    images: list[bytes | Path] = []
    for value in values:
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            images.append(value)
        elif isinstance(value, str) and value:
            images.append(Path(value))
    return tuple(images)
