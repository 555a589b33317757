"""A run folder as it lies on disk: finished, still growing, torn or half empty.

What is missing or cannot be read becomes a note for the page. Only a folder that is no run at all is an error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtfast.utils.errors import UserError
from vtfast.utils.files import step_of, write_json
from vtfast.utils.suggestions import did_you_mean, near_run, question
from vtfast.utils.yaml_file import read_yaml

if TYPE_CHECKING:  # which loads torch; a report needs none
    from vtfast.evaluate.held_out import HeldOutScores

HELD_OUT = "held_out.json"


@dataclass
class Run:
    """One run folder, read."""

    folder: Path
    name: str
    """The folder's name, with as much of its path as tells it from the other runs."""
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    """A row a step, in order of `step`; every number is finite or None."""
    evaluations: dict[str, dict[str, dict[str, Any]]]
    """folder under evaluations/ -> benchmark -> scores, in order of steps."""
    held_out: dict[str, Any] | None
    """`before` and `after` training: the fields of HeldOutScores."""
    notes: list[str] = field(default_factory=list)
    """What could not be read, in words."""

    @property
    def last_step(self) -> int:
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def status(self) -> str:
        goal = self.config.get("max_steps")
        if not isinstance(goal, int):
            return f"{self.last_step:,} steps"
        if self.last_step >= goal:
            return f"finished, {goal:,} steps"
        return f"step {self.last_step:,} of {goal:,}: still going, or stopped early"


class JsonLines:
    """The objects of a JSON-lines file. Lines that are none are counted, never raised."""

    def __init__(self, path: Path) -> None:
        self.path, self.bad, self.torn = path, 0, False

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(offset of the line in bytes, object) in the file's order; a missing file has none."""
        self.bad, self.torn, offset = 0, False, 0
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            for line in file:
                row = _object(line)
                if row is not None:
                    yield offset, row
                elif not line.endswith(b"\n"):
                    self.torn = True
                elif line.strip():
                    self.bad += 1
                offset += len(line)

    def notes(self) -> list[str]:
        """What was wrong with the lines read last."""
        if not self.path.is_file():
            return [f"{self.path.name} is missing."]
        notes = []
        if self.bad:
            notes.append(f"{self.path.name}: {self.bad} unreadable line(s) left out.")
        if self.torn:
            notes.append(f"{self.path.name}: the last line is cut off and left out.")
        return notes


def read_runs(folders: list[Path]) -> list[Run]:
    """Raises UserError for a folder that is no run, naming what was looked for."""
    names = _names(folders)
    return [_read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def save_held_out(folder: Path, before: HeldOutScores | None, after: HeldOutScores | None) -> None:
    """Leave the held-out scores in the run folder, for the report; nothing if there were no questions."""
    if before and after:
        scores = {"before": asdict(before), "after": asdict(after)}
        write_json(folder / HELD_OUT, scores)


def _since_rewind(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that count when a run went back to a checkpoint: a step that comes again replaces all from there on."""
    kept: list[dict[str, Any]] = []
    for row in rows:
        while kept and kept[-1]["step"] >= row["step"]:
            kept.pop()
        kept.append(row)
    return kept


def _read_run(folder: Path, name: str) -> Run:
    asked_for = "name the folder that training wrote (--output_dir)"
    if folder.is_file():
        raise UserError(f"{folder}: is a file; {question(near_run(folder), asked_for)}")
    if not folder.is_dir():
        wanted = "name a run folder, such as runs/tiny-spatial"
        raise UserError(f"{folder}: no such folder; {did_you_mean(folder, wanted)}")
    if not any((folder / file).is_file() for file in ("config.yaml", "metrics.jsonl")):
        raise UserError(
            f"{folder}: no run folder, for it holds neither config.yaml nor metrics.jsonl;"
            f" {question(near_run(folder), asked_for)}"
        )
    notes: list[str] = []
    lines = JsonLines(folder / "metrics.jsonl")
    rows = [{key: number(value) for key, value in row.items()} for _, row in lines]
    whole = [row for row in rows if is_step(row.get("step"))]
    notes += lines.notes()
    if len(whole) < len(rows):
        notes.append(f"metrics.jsonl: {len(rows) - len(whole)} line(s) without a step left out.")
    metrics = _since_rewind(whole)
    if len(metrics) < len(whole):
        notes.append("metrics.jsonl: the run went back to an earlier step; the newer lines count.")
    if not metrics and lines.path.is_file():
        notes.append("metrics.jsonl holds no step yet.")
    return Run(
        folder,
        name,
        _read_config(folder / "config.yaml", notes),
        metrics,
        _read_evaluations(folder / "evaluations", notes),
        _read_held_out(folder / HELD_OUT, notes),
        notes,
    )


def _read_config(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        notes.append("config.yaml is missing.")
        return {}
    try:
        return read_yaml(path)
    except UserError:
        notes.append("config.yaml cannot be read.")
        return {}


def _read_evaluations(folder: Path, notes: list[str]) -> dict[str, dict[str, dict[str, Any]]]:
    found = {}
    for path in sorted(folder.glob("*/scores.json"), key=lambda path: _by_step(path.parent.name)):
        scores = _object(path.read_bytes())
        if scores is None:
            notes.append(f"evaluations/{path.parent.name}/scores.json cannot be read.")
            continue
        found[path.parent.name] = {bench: score for bench, score in scores.items() if isinstance(score, dict)}
    return found


def _read_held_out(path: Path, notes: list[str]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    held_out = _object(path.read_bytes())
    try:
        return {
            when: {
                "count": int(held_out[when]["count"]),
                "scores": {
                    mode: {kind: (float(pair[0]), float(pair[1])) for kind, pair in kinds.items()}
                    for mode, kinds in held_out[when]["scores"].items()
                },
            }
            for when in ("before", "after")
        }
    except (TypeError, KeyError, ValueError, IndexError, AttributeError):
        notes.append(f"{path.name} cannot be read.")
        return None


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def number(value: Any) -> int | float | None:
    """`value` if it is a number that fits a float: JSON may hold more digits, and Python lets NaN and Infinity pass."""
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if real and abs(value) <= sys.float_info.max else None


def is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _by_step(name: str) -> tuple[bool, int, str]:
    """step-9 before step-10, and both before folders with other names."""
    step = step_of(name)
    return (step is None, step or 0, name)


def _names(folders: list[Path]) -> list[str]:
    """As few trailing parts of each path as tell the runs apart."""
    parts = [folder.absolute().resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError("vtfast report: the same run folder is named twice; name each once")
