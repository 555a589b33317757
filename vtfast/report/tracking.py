"""Where a step's numbers go: metrics.jsonl and completions.jsonl, TensorBoard, Weights & Biases, trackio."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vtfast.config import RunConfig
from vtfast.utils.errors import UserError

log = logging.getLogger("vtfast")


MEASURED = ("time/", "rollout/", "roofline/", "tokens_per_second", "mfu", "memory_gb", "resident_gb", "open_files")
"""Beginnings of the metrics that a clock or the machine decides: two equal runs differ in these alone."""


class Tracker:
    """Writes each step's metrics and completions into the run folder and to the trackers of `--report_to`."""

    def __init__(self, config: RunConfig, folder: Path, done: int = 0, ids: Mapping[str, str] | None = None) -> None:
        """`done`: steps behind which a resumed run goes on. `ids`: by tracker, those under which it was known."""
        self.problem: str | None = None
        """Why the newest rows are not on the disk."""
        self.metrics_file = Rows(folder / "metrics.jsonl")
        self.completions_file = Rows(folder / "completions.jsonl")
        known = ids or {}
        self.sinks = {
            name: _open_sink(name, config, folder, done, known.get(name)) for name in config.report_to if name != "none"
        }

    @property
    def ids(self) -> dict[str, str]:
        """By which a resumed run finds its curves again."""
        return {name: sink.id for name, sink in self.sinks.items() if sink.id}

    def flush(self) -> None:
        """Have the disk hold all rows so far. Raises OSError when it cannot."""
        if self.problem:
            raise OSError(self.problem)
        for file in (self.metrics_file, self.completions_file):
            file.flush()

    def log(self, step: int, metrics: Mapping[str, float | None], completions: Sequence[Mapping[str, Any]]) -> None:
        """Numbers that are not finite or not known are written as null. What the disk does not take now is kept for the
        next call, and `problem` says so."""
        finite = {key: value if value is not None and math.isfinite(value) else None for key, value in metrics.items()}
        self.problem = None
        for file, rows in ((self.metrics_file, [finite]), (self.completions_file, completions)):
            try:
                file.write(rows)
            except OSError as error:
                self.problem = f"{file.path}: cannot be written: {error.strerror}"
        for name, sink in list(self.sinks.items()):
            try:
                sink.log(step, {key: value for key, value in finite.items() if value is not None})
            except OSError as error:  # its curves are a copy: metrics.jsonl has them
                log.warning("step %d: --report_to %s ends here (%s)", step, name, error)
                del self.sinks[name]

    def close(self) -> None:
        for file in (self.metrics_file, self.completions_file):
            file.close()
        for name, sink in self.sinks.items():
            try:
                sink.close()
            except OSError as error:
                log.warning("--report_to %s: its last steps are lost (%s)", name, error)


class Rows:
    """A file that rows are added to. What the disk does not take is kept, in its order, for the next time: Python's own
    buffers forget it."""

    def __init__(self, path: Path) -> None:
        self.path, self.left = path, b""
        self.file = path.open("ab", buffering=0)

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Raises OSError when the disk does not take all that there is."""
        self.left += b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        while self.left:
            self.left = self.left[self.file.write(self.left) :]

    def flush(self) -> None:
        os.fsync(self.file.fileno())

    def close(self) -> None:
        try:
            self.write([])
        except OSError as error:
            log.warning("%s: the rows of its last steps are lost (%s)", self.path, error.strerror)
        self.file.close()


class _TensorBoard:
    id = None

    def __init__(self, folder: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = done + 1 if done else None  # points from there on are of steps that are done anew
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        for key, value in metrics.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()


class _WandbLike:
    """Weights & Biases, and trackio, which has the same calls."""

    def __init__(self, name: str, config: RunConfig, folder: Path, id: str | None) -> None:
        self.module = importlib.import_module(name)
        known = {}
        if id is not None:  # trackio knows runs by their names
            known = {"resume": "allow", **({"id": id} if name == "wandb" else {})}
        run = self.module.init(project="vtfast", name=folder.name, config=config.model_dump(), **known)
        self.id = str(getattr(run, "id", None) or folder.name)

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        self.module.log(dict(metrics), step=step)

    def close(self) -> None:
        self.module.finish()


def check_trackers(names: Sequence[str]) -> None:
    """Raises UserError for a tracker that is not installed; called before anything is loaded."""
    for name in names:
        if name in ("wandb", "trackio") and importlib.util.find_spec(name) is None:
            raise UserError(f"--report_to {name}: not installed (pip install {name})")


def _open_sink(name: str, config: RunConfig, folder: Path, done: int, id: str | None) -> _TensorBoard | _WandbLike:
    if name == "tensorboard":
        return _TensorBoard(folder, done)
    return _WandbLike(name, config, folder, id)
