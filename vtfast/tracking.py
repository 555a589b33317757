"""Where a step's numbers go: metrics.jsonl and completions.jsonl, TensorBoard, Weights & Biases, trackio."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vtfast.config import RunConfig
from vtfast.errors import UserError


class Tracker:
    """Writes each step's metrics and completions into the run folder and to the trackers of `--report_to`."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.metrics_file = (folder / "metrics.jsonl").open("a")
        self.completions_file = (folder / "completions.jsonl").open("a")
        self.sinks = [
            _open_sink(name, config, folder) for name in config.report_to if name != "none"
        ]

    def log(
        self,
        step: int,
        metrics: Mapping[str, float | None],
        completions: Sequence[Mapping[str, Any]],
    ) -> None:
        """Numbers that are not finite or not known are written as null."""
        finite = {
            key: value if value is not None and math.isfinite(value) else None
            for key, value in metrics.items()
        }
        self.metrics_file.write(json.dumps(finite) + "\n")
        self.metrics_file.flush()
        self.completions_file.writelines(json.dumps(row) + "\n" for row in completions)
        self.completions_file.flush()
        for sink in self.sinks:
            sink.log(step, {key: value for key, value in finite.items() if value is not None})

    def close(self) -> None:
        self.metrics_file.close()
        self.completions_file.close()
        for sink in self.sinks:
            sink.close()


class _TensorBoard:
    def __init__(self, config: RunConfig, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()


class _WandbLike:
    """Weights & Biases, and trackio, which has the same calls."""

    def __init__(self, module: Any, config: RunConfig, folder: Path) -> None:
        self.module = module
        module.init(project="vtfast", name=folder.name, config=vars(config))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.module.log(dict(metrics), step=step)

    def close(self) -> None:
        self.module.finish()


def check_trackers(names: Sequence[str]) -> None:
    """Raises UserError for a tracker that is not installed; called before anything is loaded."""
    for name in names:
        if name in ("wandb", "trackio") and importlib.util.find_spec(name) is None:
            raise UserError(f"--report_to {name}: not installed (pip install {name})")


def _open_sink(name: str, config: RunConfig, folder: Path) -> _TensorBoard | _WandbLike:
    if name == "tensorboard":
        return _TensorBoard(config, folder)
    return _WandbLike(importlib.import_module(name), config, folder)
