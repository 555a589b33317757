"""Where a step's numbers go: metrics.jsonl and completions.jsonl, TensorBoard, Weights & Biases, trackio."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vtfast.config import RunConfig
from vtfast.utils.errors import UserError

log = logging.getLogger("vtfast")


MEASURED = ("time/", "rollout/", "roofline/", "tokens_per_second", "mfu", "memory_gb", "resident_gb", "open_files")
"""Prefixes of the metrics that depend on a clock or the machine; two equal runs differ in these alone."""


class Tracker:
    """Writes each step's metrics and completions into the run folder and to the trackers of `--report_to`."""

    def __init__(self, config: RunConfig, folder: Path, done: int = 0, ids: Mapping[str, str] | None = None) -> None:
        """
        Args:
            folder: the run's.
            done: optimizer steps that a resumed run has done.
            ids: the resumed run's ids, by tracker.
        """
        self.problem: str | None = None
        """Why the newest rows are not on the disk."""
        self.metrics_file = JsonLinesWriter(folder / "metrics.jsonl")
        self.completions_file = JsonLinesWriter(folder / "completions.jsonl")
        known = ids or {}
        self.sinks: dict[str, _TensorBoard | _WandbLike] = {
            name: _TensorBoard(folder, done)
            if name == "tensorboard"
            else _WandbLike(name, config, folder, known.get(name))
            for name in config.report_to
            if name != "none"
        }

    @property
    def ids(self) -> dict[str, str]:
        """Ids by tracker, under which a resumed run continues its curves."""
        return {name: sink.id for name, sink in self.sinks.items() if sink.id}

    def flush(self) -> None:
        """Flush all rows to the disk. Raises OSError if some are not written yet."""
        if self.problem:
            raise OSError(self.problem)
        for file in (self.metrics_file, self.completions_file):
            file.flush()

    def log(self, step: int, metrics: Mapping[str, float | None], completions: Sequence[Mapping[str, Any]]) -> None:
        """Write the rows of a step; numbers that are not finite are written as null. Rows that the disk refuses are
        written by the next call, and `problem` is set."""
        finite = {key: value if value is not None and math.isfinite(value) else None for key, value in metrics.items()}
        problems = (self.metrics_file.write([finite]), self.completions_file.write(completions))
        self.problem = next(filter(None, reversed(problems)), None)
        known = {key: value for key, value in finite.items() if value is not None}
        for name, sink in list(self.sinks.items()):
            self._send(name, functools.partial(sink.log, step, known))

    def close(self) -> None:
        """Write the rows that are left and close all files and trackers."""
        for file in (self.metrics_file, self.completions_file):
            file.close()
        for name, sink in list(self.sinks.items()):
            self._send(name, sink.close)

    def _send(self, name: str, send: Callable[[], None]) -> None:
        """Call a tracker; one that fails is dropped, as metrics.jsonl holds the same numbers."""
        try:
            send()
        except OSError as error:
            log.warning("--report_to %s: its curves end here (%s); metrics.jsonl has all steps", name, error)
            del self.sinks[name]


class JsonLinesWriter:
    """A file that rows are appended to. Rows that the disk refuses are kept in order and written later; Python's own
    buffers lose them."""

    def __init__(self, path: Path) -> None:
        self.path, self.unwritten = path, b""
        self.file = path.open("ab", buffering=0)

    def write(self, rows: Sequence[Mapping[str, Any]]) -> str | None:
        """Append rows -> why the disk refused some of them; None if all are written."""
        self.unwritten += b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        except OSError as error:
            return f"{self.path}: cannot be written: {error.strerror}"
        return None

    def flush(self) -> None:
        os.fsync(self.file.fileno())

    def close(self) -> None:
        if problem := self.write([]):
            log.warning("%s; the rows of its last steps are lost", problem)
        self.file.close()


class _TensorBoard:
    id = None

    def __init__(self, folder: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = done + 1 if done else None  # a resumed run repeats the steps from there on
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()


class _WandbLike:
    """Weights & Biases, and trackio, which has the same functions."""

    def __init__(self, name: str, config: RunConfig, folder: Path, id: str | None) -> None:
        self.module = importlib.import_module(name)
        resume = {}
        if id is not None:  # trackio identifies a run by its name alone
            resume = {"resume": "allow", **({"id": id} if name == "wandb" else {})}
        run = self.module.init(project="vtfast", name=folder.name, config=config.model_dump(), **resume)
        self.id = str(getattr(run, "id", None) or folder.name)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.module.log(dict(metrics), step=step)

    def close(self) -> None:
        self.module.finish()


def check_trackers(names: Sequence[str]) -> None:
    """Raises UserError for a tracker that is not installed."""
    for name in names:
        if name in ("wandb", "trackio") and importlib.util.find_spec(name) is None:
            raise UserError(f"--report_to {name}: not installed (pip install {name})")
