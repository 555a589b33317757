"""Counts events inside a trainer and injects a fault at the n-th one. Runs in the trainer's process.

A moment is a count and not a time, so that a trial that failed fails again. Nothing of vtfast knows about this: named
functions are wrapped from outside, and files are watched through Python's audit events and `os.fsync`, `os.rename`.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

VARIABLE = "VTFAST_FAULT"
"""Environment variable that carries the orders to a trainer."""
WRAPPED = {
    "rollout": "vtfast.rollout.scheduler.Scheduler.decode",  # a token for every row
    "backward": "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer.process_gradients",  # a weight's gradient
    "optimizer": "torch.optim.AdamW.step",  # this rank's share of the weights is new, the others' are not yet
}
"""Places that are functions; "optimizer" is counted after the call, the others before it."""
FILES = ("open", "fsync", "rename", "renamed", "drop", "tidy", "log")
"""Places of file operations: before a file of a checkpoint is opened, before it is flushed, before and after the folder
is renamed, before each removal in an old checkpoint, before anything else in the run folder is renamed, and after a
line of the logs."""
PLACES = (*WRAPPED, *FILES)
MAIN_ONLY = ("rename", "renamed", "drop", "tidy", "log")
"""Places that only rank 0 reaches."""
IMPATIENCE = 10
"""Most visits between an impatient scheduler's SIGTERM and its SIGKILL."""
STEP = re.compile(r"step-(\d+)$")
PARTIAL = ".partial"


@dataclass(frozen=True)
class Moment:
    """The `nth` time (from 1) that a rank comes to `place`."""

    place: str
    nth: int
    action: str = "SIGKILL"
    """SIGKILL; SIGTERM, as a scheduler gives notice; impatient: SIGTERM, and SIGKILL a few visits of any place later;
    tear: leave the file that was being written cut short, and die."""
    rank: int | None = None
    """The rank that is struck; None: each, when it comes there."""
    share: float = 0.5
    """How much is left of what tear cuts, from 0 up to 1."""
    notify: str = "self"
    """Who gets a SIGTERM: self, or parent (the launcher, which passes it on)."""


@dataclass(frozen=True)
class Orders:
    """The orders for a trainer: where it writes its journal, and when it dies, if at all."""

    journal: str
    folder: str
    """The run folder."""
    moment: Moment | None = None

    def encode(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(asdict(self))}


def read_orders() -> Orders:
    values = json.loads(os.environ[VARIABLE])
    moment = values.pop("moment")
    return Orders(**values, moment=Moment(**moment) if moment else None)


class Watch:
    """Counts the visits of every place, and strikes at the moment ordered."""

    def __init__(self, orders: Orders, rank: int) -> None:
        self.orders, self.rank = orders, rank
        self.counts: Counter[str] = Counter()
        self.journal = os.open(orders.journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self.folder = os.path.abspath(orders.folder) + os.sep
        self.checkpoints = os.path.join(self.folder, "checkpoints", "")
        self.removing = False
        self.visits_left: int | None = None

    def note(self, *words: object) -> None:
        """A line of the journal. One write of a few bytes: whole or absent, whatever happens next."""
        os.write(self.journal, (" ".join(map(str, words)) + "\n").encode())

    def visit(self, place: str, tear: Callable[[float], None] | None = None) -> None:
        """`tear`: cuts what is being written down to a share."""
        self.counts[place] += 1
        if self.visits_left is not None:
            self.visits_left -= 1
            if self.visits_left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        moment = self.orders.moment
        if (
            moment is None
            or (place, self.counts[place]) != (moment.place, moment.nth)
            or moment.rank not in (None, self.rank)
        ):
            return
        self.note("struck", self.rank, place, moment.nth)
        if moment.action in ("SIGTERM", "impatient"):
            if moment.action == "impatient":
                self.visits_left = int(moment.share * IMPATIENCE)
            os.kill(os.getppid() if moment.notify == "parent" else os.getpid(), signal.SIGTERM)
            return
        if moment.action == "tear" and tear is not None:
            tear(moment.share)
        os.kill(os.getpid(), signal.SIGKILL)

    # Functions

    def wrap(self, place: str, path: str) -> None:
        owner, name = _find(path)
        function = getattr(owner, name)

        @functools.wraps(function)
        def counted(*args, **kwargs):
            if place != "optimizer":
                self.visit(place)
            result = function(*args, **kwargs)
            if place == "optimizer":
                self.visit(place)
            return result

        setattr(owner, name, counted)

    # Files

    def watch_files(self) -> None:
        fsync = os.fsync
        sys.addaudithook(self.audit)

        @functools.wraps(fsync)
        def flush(file) -> None:
            descriptor = file if isinstance(file, int) else file.fileno()
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if self.is_partial(path) and os.path.isfile(path):
                self.visit("fsync", lambda share: os.truncate(path, _cut(path, share)))
            fsync(file)

        os.fsync = flush
        os.rename, os.replace = self.renaming(os.rename), self.renaming(os.replace)

    def renaming(self, rename: Callable) -> Callable:
        @functools.wraps(rename)
        def watched(source, target, **kwargs) -> None:
            lands = self.checkpoint_of(target)
            if lands:
                self.visit("rename")
            elif self.is_inside(source, self.checkpoints) and self.is_inside(target, self.checkpoints):
                if self.checkpoint_of(source):
                    self.visit("drop")
            elif self.is_inside(source, self.folder):
                self.visit("tidy")
            rename(source, target, **kwargs)
            if lands:
                self.note("landed", lands)
                self.visit("renamed")

        return watched

    def audit(self, event: str, arguments: tuple) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR) if flags else "w" in (mode or "")
            if writes and isinstance(path, str) and self.is_partial(path):
                self.visit("open")
        elif event == "shutil.rmtree":
            path = os.fspath(arguments[0])
            self.removing = self.is_inside(path, self.checkpoints)
            if self.removing and self.checkpoint_of(path):
                self.visit("drop")
        elif event == "os.remove" and self.removing:
            self.visit("drop")

    def checkpoint_of(self, path: str | os.PathLike) -> int | None:
        """The step of a checkpoint's folder; None for any other path."""
        path = os.path.abspath(os.fspath(path))
        found = STEP.match(path.removeprefix(self.checkpoints))
        return int(found[1]) if found and path.startswith(self.checkpoints) else None

    def is_partial(self, path: str) -> bool:
        return self.is_inside(path, self.checkpoints) and PARTIAL in path

    @staticmethod
    def is_inside(path: str | os.PathLike, folder: str) -> bool:
        return os.path.abspath(os.fspath(path)).startswith(folder)

    def watch_log(self) -> None:
        """Cut off the lines that a step has just written, in the order in which they were written."""
        from vtfast.report.tracking import Tracker

        log, folder = Tracker.log, Path(self.orders.folder)
        files = [folder / "metrics.jsonl", folder / "completions.jsonl"]

        @functools.wraps(log)
        def watched(*args, **kwargs) -> None:
            before = [file.stat().st_size for file in files]
            log(*args, **kwargs)
            written = [file.stat().st_size - size for file, size in zip(files, before, strict=True)]

            def tear(share: float) -> None:
                left = int(share * sum(written))
                for file, size, new in zip(files, before, written, strict=True):
                    os.truncate(file, size + min(new, left))
                    left -= min(new, left)

            self.visit("log", tear)

        Tracker.log = watched


def plant(orders: Orders, rank: int) -> Watch:
    """Wrap everything that is counted. Imports the trainer."""
    watch = Watch(orders, rank)
    for place, path in WRAPPED.items():
        watch.wrap(place, path)
    watch.watch_log()
    watch.watch_files()
    return watch


def _find(path: str) -> tuple[object, str]:
    """The object that holds the last name of a dotted path, and that name."""
    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            owner = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:-1]:
            owner = getattr(owner, part)
        return owner, parts[-1]
    raise ModuleNotFoundError(path)


def _cut(path: str, share: float) -> int:
    return int(os.path.getsize(path) * share)
