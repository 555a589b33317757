"""A run's logs after a resume: as if the run had stopped at the checkpoint that it resumes from.

Nothing is deleted: rows and files of later steps are moved to RUN/superseded-K.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from vtfast.training.checkpoint.save import checkpoints
from vtfast.training.stopping import STOP_FILE
from vtfast.utils.errors import UserError
from vtfast.utils.files import atomic_file, flush, read_json, step_of, write_atomically

log = logging.getLogger("vtfast")
LOGS = ("metrics.jsonl", "completions.jsonl", "skipped.jsonl", "nonfinite.jsonl")
LISTS = LOGS[2:]
"""Logs that are opened anew for each row."""
SUPERSEDED = "superseded-"
COMPLETED = "completed.json"
"""Written last: the run has been evaluated and its report written."""


def mark_completed(run: Path, step: int) -> None:
    write_atomically(run / COMPLETED, json.dumps({"step": step}) + "\n")


def completed_step(run: Path) -> int:
    """The last step of a run that is complete, evaluation and report included; 0 for any other run."""
    try:
        return int(read_json(run / COMPLETED)["step"]) if (run / COMPLETED).exists() else 0
    except (UserError, LookupError, TypeError, ValueError) as error:
        log.warning("%s: cannot be read (%s); the run is evaluated again", run / COMPLETED, error)
        return 0


def flush_lists(run: Path) -> None:
    """Flush all rows of the lists, and the names of all logs, to the disk."""
    for path in (run / name for name in LISTS):
        if path.exists():
            flush(path)
    flush(run)


def cut_back(run: Path, step: int) -> None:
    """Move to RUN/superseded-K: rows of steps after `step`, lines that are not rows (a kill may cut one off), later
    checkpoints and their evaluations."""
    superseded = _Superseded(run)
    for name in LOGS:
        if not _all_up_to(run / name, step):
            _copy(run / name, superseded.folder() / name, lambda line: not _is_up_to(line, step))
            _copy(run / name, run / name, lambda line: _is_up_to(line, step))
    for folder in [*checkpoints(run / "checkpoints"), *checkpoints(run / "evaluations")]:
        if (step_of(folder.name) or 0) > step:
            superseded.move(folder)
    if completed_step(run) > step:
        superseded.move(run / COMPLETED)
    _remove_leftovers(run)
    if superseded.path:
        log.info("everything after step %d has been moved to %s", step, superseded.path)


def set_aside(run: Path) -> None:
    """Move everything in a run folder to RUN/superseded-K: the run starts from the beginning.

    config.yaml is moved last: as long as it is there, a start that is killed in between can be repeated."""
    _remove_leftovers(run)
    superseded = _Superseded(run)
    for path in sorted(run.iterdir(), key=lambda path: (path.name == "config.yaml", path.name)):
        if not path.name.startswith(SUPERSEDED):
            superseded.move(path)
    log.info("the files of the earlier start have been moved to %s", superseded.path)


def _remove_leftovers(run: Path) -> None:
    """Delete what a killed process has left behind: a half-written checkpoint, copy or log, a stop request."""
    for folder in (*(run / "checkpoints").glob(".step-*"), run / ".data.partial"):
        shutil.rmtree(folder, ignore_errors=True)
    for file in (run / STOP_FILE, *run.glob(".*.partial"), *run.glob(f"{SUPERSEDED}*/.*.partial")):
        file.unlink(missing_ok=True)


def copy_logs(source: Path, run: Path, step: int) -> None:
    """Copy the rows up to `step` of another run, of which this one is a fork."""
    for name in LOGS:
        if (source / name).exists():
            _copy(source / name, run / name, lambda line: _is_up_to(line, step))


def make_first_free(folders: Iterator[Path]) -> Path:
    """Make the first of these folders that does not exist yet."""
    while True:
        folder = next(folders)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder


def _copy(source: Path, to: Path, keep: Callable[[bytes], bool]) -> None:
    """Replace `to` by the lines of `source` that `keep` accepts. Logs may be larger than memory."""
    with source.open("rb") as lines, atomic_file(to) as file:
        file.writelines(line for line in lines if keep(line))


def _all_up_to(path: Path, step: int) -> bool:
    if not path.exists():
        return True
    with path.open("rb") as file:
        return all(_is_up_to(line, step) for line in file)


def _is_up_to(line: bytes, step: int) -> bool:
    """Whether a line is a whole row of `step` or a step before."""
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


class _Superseded:
    """RUN/superseded-K with the next free K; the folder is made when something is moved there."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.path: Path | None = None

    def folder(self) -> Path:
        if self.path is None:
            self.path = make_first_free(self.run / f"{SUPERSEDED}{number}" for number in itertools.count(1))
        return self.path

    def move(self, path: Path) -> None:
        target = self.folder() / path.relative_to(self.run)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
