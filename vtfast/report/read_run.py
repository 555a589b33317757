"""Reads a run folder, of a run that is finished, still training or was killed.

Files that are missing or cannot be read become notes on the page. Only a folder that is not a run folder is an error.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from vtfast.utils.did_you_mean import did_you_mean, near_run, question
from vtfast.utils.errors import UserError
from vtfast.utils.files import read_json, step_of, write_json
from vtfast.utils.yaml_file import read_yaml

if TYPE_CHECKING:  # it imports torch, which a report does not need
    from vtfast.evaluate.held_out import HeldOutScores

HELD_OUT = "held_out.json"


class HeldOutResult(TypedDict):
    """The fields of `evaluate.held_out.HeldOutScores`."""

    count: int
    scores: dict[str, dict[str, tuple[float, float]]]
    """mode -> kind of question -> (accuracy, format)."""


class BeforeAndAfter(TypedDict):
    """held_out.json: results before and after training."""

    before: HeldOutResult
    after: HeldOutResult


@dataclass
class Run:
    """The contents of a run folder."""

    folder: Path
    name: str
    """The folder's name, with as much of its path as is needed to distinguish the runs."""
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    """One row per step, in order of `step`; every number is finite or None."""
    evaluations: dict[str, dict[str, dict[str, Any]]]
    """folder under evaluations/ -> benchmark -> scores, in order of steps."""
    held_out: BeforeAndAfter | None
    notes: list[str] = field(default_factory=list)
    """Sentences on what could not be read."""

    @property
    def last_step(self) -> int:
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def status(self) -> str:
        """How far the run has come, in words."""
        max_steps = self.config.get("max_steps")
        if not isinstance(max_steps, int):
            return f"{self.last_step:,} steps"
        if self.last_step >= max_steps:
            return f"finished, {max_steps:,} steps"
        return f"step {self.last_step:,} of {max_steps:,}: still running, or stopped early"


class JsonLinesReader:
    """The objects of a JSON-lines file. Lines that cannot be read, such as the last one of a run that was killed, are
    counted and not raised."""

    def __init__(self, path: Path) -> None:
        self.path, self.bad = path, 0

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(offset of the line in bytes, object) in the file's order; nothing for a missing file."""
        self.bad, offset = 0, 0
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            for line in file:
                row = _object(line)
                if row is not None:
                    yield offset, row
                elif line.strip():
                    self.bad += 1
                offset += len(line)

    def notes(self) -> list[str]:
        """A sentence on what was wrong with the lines of the last iteration, if anything was."""
        if not self.path.is_file():
            return [f"{self.path.name} is missing."]
        return [f"{self.path.name}: {self.bad} unreadable line(s) left out."] if self.bad else []


def read_runs(folders: list[Path]) -> list[Run]:
    """Read run folders. Raises UserError for a folder that is not one."""
    names = _names(folders)
    return [_read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def save_held_out(folder: Path, before: HeldOutScores | None, after: HeldOutScores | None) -> None:
    """Write the held-out scores into the run folder, for the report; nothing if there were no questions."""
    if before and after:
        scores = {"before": asdict(before), "after": asdict(after)}
        write_json(folder / HELD_OUT, scores)


def _drop_repeated(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop the older rows of a run that went back to a checkpoint: a repeated step replaces all from there on."""
    newest: list[dict[str, Any]] = []
    for row in rows:
        while newest and newest[-1]["step"] >= row["step"]:
            newest.pop()
        newest.append(row)
    return newest


def _read_run(folder: Path, name: str) -> Run:
    if not any((folder / file).is_file() for file in ("config.yaml", "metrics.jsonl")):
        what = "name the folder that training wrote (--output_dir)"
        if not folder.exists():
            raise UserError(f"{folder}: no such folder; {did_you_mean(folder, what)}")
        reason = "holds neither config.yaml nor metrics.jsonl" if folder.is_dir() else "is a file"
        raise UserError(f"{folder}: is not a run folder, it {reason}; {question(near_run(folder), what)}")
    notes: list[str] = []
    lines, steps = JsonLinesReader(folder / "metrics.jsonl"), []
    for _, row in lines:
        if is_step(row.get("step")):
            steps.append({key: number(value) for key, value in row.items()})
        else:
            lines.bad += 1
    notes += lines.notes()
    metrics = _drop_repeated(steps)
    if len(metrics) < len(steps):
        notes.append("metrics.jsonl: the run went back to an earlier step; its newer lines are shown.")
    if not metrics and lines.path.is_file():
        notes.append("metrics.jsonl holds no step yet.")
    config: dict[str, Any] = {}
    with _noted("config.yaml", notes):
        config = read_yaml(folder / "config.yaml")
    held_out = None
    if (folder / HELD_OUT).is_file():
        with _noted(HELD_OUT, notes):
            held_out = TypeAdapter(BeforeAndAfter).validate_json((folder / HELD_OUT).read_bytes())
    return Run(folder, name, config, metrics, _read_evaluations(folder, notes), held_out, notes)


def _read_evaluations(folder: Path, notes: list[str]) -> dict[str, dict[str, dict[str, Any]]]:
    evaluations = {}
    for path in sorted(folder.glob("evaluations/*/scores.json"), key=lambda path: _by_step(path.parent.name)):
        with _noted(f"evaluations/{path.parent.name}/scores.json", notes):
            scores = read_json(path)
            evaluations[path.parent.name] = {name: score for name, score in scores.items() if isinstance(score, dict)}
    return evaluations


@contextlib.contextmanager
def _noted(name: str, notes: list[str]) -> Iterator[None]:
    """An error of reading a file becomes a note."""
    try:
        yield
    except ValueError:  # UserError and pydantic's ValidationError, too
        notes.append(f"{name} cannot be read.")


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def number(value: Any) -> int | float | None:
    """`value` if it is a finite number that fits a float, else None: JSON holds longer ones, Python reads NaN."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and abs(value) <= sys.float_info.max else None


def is_step(value: Any) -> TypeGuard[int]:
    """Whether `value` is a step number that JavaScript can hold, too."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _by_step(name: str) -> tuple[bool, int, str]:
    """Sort key: step-9 before step-10, and both before folders with other names."""
    step = step_of(name)
    return (step is None, step or 0, name)


def _names(folders: list[Path]) -> list[str]:
    """The shortest trailing part of each path that distinguishes the runs."""
    parts = [folder.absolute().resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError("vtfast report: a run folder is named twice; name each once")
