"""A run's logs after a resume: as if the run had never gone beyond the step that it goes on from.

Nothing is deleted: what is later than that step goes to RUN/superseded-K.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from vtfast.training.checkpoint.save import checkpoints
from vtfast.training.stopping import STOP_FILE
from vtfast.utils.files import flush, write_whole, written_whole

log = logging.getLogger("vtfast")
LOGS = ("metrics.jsonl", "completions.jsonl", "skipped.jsonl", "nonfinite.jsonl")
LISTS = LOGS[2:]
"""Those that nobody holds open."""
SUPERSEDED = "superseded-"
COMPLETED = "completed.json"
"""Written last: the run has been judged and reported."""


def mark_completed(run: Path, step: int) -> None:
    write_whole(run / COMPLETED, json.dumps({"step": step}) + "\n")


def completed_step(run: Path) -> int:
    """The last step of a run that has been judged and reported; 0 for one that has not."""
    try:
        return int(json.loads((run / COMPLETED).read_text(encoding="utf-8"))["step"])
    except FileNotFoundError:
        return 0
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s: cannot be read (%s); the run is judged again", run / COMPLETED, error)
        return 0


def flush_lists(run: Path) -> None:
    """Have the disk hold all rows of the lists so far, and the names of all logs."""
    for path in (run / name for name in LISTS):
        if path.exists():
            flush(path)
    flush(run)


def cut_back(run: Path, step: int) -> None:
    """Move rows of later steps than `step`, lines that are none, later checkpoints and what was made of them to
    RUN/superseded-K. A line that a kill has torn goes there too."""
    aside = _Aside(run)
    for name in LOGS:
        if not _all_belong(run / name, step):
            _copy(run / name, aside.folder() / name, lambda line: not _belongs(line, step))
            _copy(run / name, run / name, lambda line: _belongs(line, step))
    for number, folder in checkpoints(run / "checkpoints"):
        if number > step:
            aside.take(folder)
    evaluations = run / "evaluations"
    for _, folder in [entry for entry in checkpoints(evaluations) if entry[0] > step]:
        aside.take(folder)
    if completed_step(run) > step:
        aside.take(run / COMPLETED)
    _clear(run)
    if aside.taken:
        log.info("what came after step %d is in %s now", step, aside.taken)


def set_aside(run: Path) -> None:
    """Move all of a run folder to RUN/superseded-K: the run starts from the beginning.

    config.yaml goes last: as long as it is there, a start that is killed here can be made again."""
    _clear(run)
    aside = _Aside(run)
    for path in sorted(run.iterdir(), key=lambda path: (path.name == "config.yaml", path.name)):
        if not path.name.startswith(SUPERSEDED):
            aside.take(path)
    log.info("what was there is in %s now", aside.taken)


def _clear(run: Path) -> None:
    """Delete what a start that was killed has left half done: a save, a removal, a cut, a stop."""
    for leftover in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(leftover)
    partial = (*run.glob(".*.partial"), *run.glob(f"{SUPERSEDED}*/.*.partial"))
    for leftover in (run / STOP_FILE, *partial):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)


def copy_logs(source: Path, run: Path, step: int) -> None:
    """The rows up to `step` of another run, which this one goes on from."""
    for name in LOGS:
        if (source / name).exists():
            _copy(source / name, run / name, lambda line: _belongs(line, step))


def _copy(source: Path, to: Path, wanted: Callable[[bytes], bool]) -> None:
    """The wanted lines of `source`, in place of `to` at once. Logs may be larger than memory."""
    with source.open("rb") as lines, written_whole(to) as file:
        file.writelines(line for line in lines if wanted(line))


def _all_belong(path: Path, step: int) -> bool:
    if not path.exists():
        return True
    with path.open("rb") as file:
        return all(_belongs(line, step) for line in file)


def _belongs(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


class _Aside:
    """RUN/superseded-K with the next free K, made when there is something for it."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.taken: Path | None = None

    def folder(self) -> Path:
        number = 1
        while self.taken is None:
            try:
                (self.run / f"{SUPERSEDED}{number}").mkdir()
                self.taken = self.run / f"{SUPERSEDED}{number}"
            except FileExistsError:
                number += 1
        return self.taken

    def take(self, path: Path) -> None:
        into = self.folder() / path.relative_to(self.run)
        into.parent.mkdir(parents=True, exist_ok=True)
        path.rename(into)
