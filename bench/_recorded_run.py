"""The work and the times of a run folder, from which `bench roofline` and `bench scale` start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from vtfast.config import Config, load_config
from vtfast.cost.devices import DEVICES, Rates, data_sheet
from vtfast.cost.micro_batches import GroupSize
from vtfast.cost.roofline import ModelSize
from vtfast.model.adapters import add_lora
from vtfast.model.loading import read_model_config
from vtfast.model.meta_model import meta_policy
from vtfast.report.read_run import JsonLinesReader, read_runs
from vtfast.utils.errors import UserError
from vtfast.utils.hub import model_path

NEEDED = ("step", "row", "length", "prompt_length", "patches", "advantage", "rank")


@dataclass(frozen=True)
class Step:
    """One optimizer step of a run."""

    number: int
    metrics: Mapping[str, float | None]
    everyone: list[list[GroupSize]]
    """The groups of each rank; those of an earlier step if this one updates on its completions again."""
    fresh: bool
    """Whether this step had a rollout."""


@dataclass(frozen=True)
class Recorded:
    """The contents of a run folder that the benches need."""

    name: str
    config: Config
    weights: ModelSize
    rates: Rates
    steps: list[Step]

    @property
    def ranks(self) -> int:
        return len(self.steps[0].everyone)

    @property
    def settled(self) -> list[Step]:
        """All steps but the first, which compiles and warms up; the first if there are no others."""
        return self.steps[1:] or self.steps


def read_recorded(folder: Path, device: str | None = None, dtype: str | None = None) -> Recorded:
    """Read a run folder.

    Args:
        device: take this device's rates from its data sheet, not the rates that the run used.
        dtype: of the weights, if the folder does not record it.

    Raises UserError, naming what is missing, for a folder that cannot be used."""
    (run,) = read_runs([folder])
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: holds no config.yaml, so its settings are unknown")
    config = load_config(file=folder / "config.yaml")
    checkpoints = sorted((folder / "checkpoints").glob("step-*/config.json"), key=lambda p: p.stat().st_mtime)
    model = str(checkpoints[-1].parent) if checkpoints else model_path(config.model)
    precision = _dtype(folder, config, run.metrics, dtype)
    policy = meta_policy(read_model_config(model), precision, [] if config.use_peft else config.freeze)
    if config.use_peft:
        add_lora(policy, config.lora_r, config.lora_alpha, config.lora_target_modules)
    groups = _groups(folder, config)
    steps, everyone = [], None
    for line in run.metrics:
        number = line["step"]
        fresh = (number - 1) % config.num_iterations == 0
        everyone = groups.get(number) if fresh else everyone
        if everyone is not None:
            steps.append(Step(number, line, everyone, fresh))
    if not steps:
        raise UserError(f"{folder}: no step is in both metrics.jsonl and completions.jsonl")
    rates = _rates(folder, config, run.metrics, device, precision, len(steps[0].everyone))
    return Recorded(run.name, config, ModelSize.of(policy), rates, steps)


def _groups(folder: Path, config: Config) -> dict[int, list[list[GroupSize]]]:
    """The groups of each rank by step. If a resumed run repeated a step, its newer rows are used."""
    rows: dict[int, dict[tuple[int, int], list[dict]]] = {}
    newest = 0
    for _, row in JsonLinesReader(folder / "completions.jsonl"):
        missing = [name for name in NEEDED if name not in row]
        if missing:
            raise UserError(
                f"{folder}/completions.jsonl: rows lack {', '.join(missing)}; an older version of vtfast wrote them"
            )
        if row["step"] < newest:
            rows = {step: groups for step, groups in rows.items() if step < row["step"]}
        newest = row["step"]
        rows.setdefault(newest, {}).setdefault(row["rank"], []).append(row)
    ranks = 1 + max((rank for step in rows.values() for rank in step), default=0)
    G = config.num_generations
    return {
        step: [
            [_size(mine[i : i + G], config) for i in range(0, len(mine), G)]
            for mine in (by_rank.get(rank, []) for rank in range(ranks))
        ]
        for step, by_rank in rows.items()
    }


def _size(rows: list[dict], config: Config) -> GroupSize:
    trained = config.beta > 0 or any(row["advantage"] != 0 for row in rows)
    first = rows[0]
    return GroupSize(first["prompt_length"], [row["length"] for row in rows], first["patches"], trained)


def _dtype(folder: Path, config: Config, metrics: list[dict], asked: str | None) -> torch.dtype:
    sizes = {line.get("roofline/weight_bytes") for line in metrics} - {None}
    name = asked or (config.dtype if config.dtype != "auto" else None)
    if name is None and not sizes:
        raise UserError(f"{folder}: the precision of the weights is not recorded; add --dtype float32 or bfloat16")
    return getattr(torch, name) if name else {4: torch.float32, 2: torch.bfloat16}[max(sizes)]


def _rates(
    folder: Path, config: Config, metrics: list[dict], device: str | None, dtype: torch.dtype, ranks: int
) -> Rates:
    if device is not None:
        rates = data_sheet(device, dtype, link=ranks > 1)
        if rates is None:
            raise UserError(f"--device {device}: not listed; choose one of {', '.join(DEVICES)}")
        return rates
    known = [line for line in metrics if line.get("roofline/flops")]
    if not known:
        raise UserError(
            f"{folder}: the run recorded no rates of its device; name one with --device"
            " (or train with --roofline_rates measured)"
        )
    last, source = known[-1], config.roofline_rates.replace("_", " ")
    return Rates(last["roofline/flops"], last["roofline/bandwidth"], last.get("roofline/link"), source)
