"""The inputs of `bench scale`: a run folder, rows of the benches, or floors over a stated efficiency."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from bench._recorded_run import Recorded
from bench._scaling import Measured, Work
from bench._workload import MID, TINY, TWO_B, Shape, model_config
from vtfast.cost.devices import DEVICES, Rates, data_sheet
from vtfast.cost.micro_batches import GroupSize
from vtfast.cost.roofline import PHASES, ModelSize, decode_floor, micro_batch_floor, optimizer_floor, prefill_floor
from vtfast.model.meta_model import meta_policy
from vtfast.training.speed import phase_seconds
from vtfast.utils.errors import UserError

EFFICIENCY = (0.6, 0.4)
"""Fractions of the floor's speed of rollout and update, if nothing is measured: the goals of `bench rollout` and `bench
update` on a GPU."""


@dataclass(frozen=True)
class Start:
    """The work and times of one GPU that the model starts from."""

    source: str
    """In words."""
    work: Work
    measured: Measured
    rates: Rates
    is_estimate: bool = False


def from_run(run: Recorded) -> Start:
    if run.ranks > 1:
        raise UserError(
            f"{run.name}: was measured on {run.ranks} ranks, which wait for each other in every phase; run a few steps"
            " on one"
        )
    if run.config.num_iterations > 1:
        raise UserError(f"{run.name}: --num_iterations above 1 cannot be modelled")
    steps = run.settled
    times = [phase_seconds(step.metrics) for step in steps]
    mean = {name: float(np.mean([time.get(name, 0.0) for time in times])) for name in (*PHASES, "step")}
    split = [time["prefill"] + time["decode"] for time in times if "decode" in time]
    groups = [group for step in steps for group in step.everyone[0]]
    if not any(group.trained for group in groups):
        raise UserError(f"{run.name}: all advantages are 0, so no update was measured")
    return Start(
        f"{run.name}, means of steps {steps[0].number} to {steps[-1].number}",
        Work(run.weights, groups, run.config.tokens_per_micro_batch, run.config.rollout_max_rows),
        Measured(
            round(len(groups) / len(steps)),
            **{name: mean[name] for name in PHASES},
            rest=mean["step"] - sum(mean[name] for name in PHASES),
            host=mean["rollout"] - float(np.mean(split)) if split else 0.0,
        ),
        run.rates,
    )


def from_rows(files: Sequence[Path], device: str | None) -> Start:
    """The newest pair of a rollout row and an update row of one shape on one device."""
    rows: dict[tuple[str, str, str], dict[str, dict]] = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file; the rows are in bench/results")
        with file.open(newline="") as lines:
            for row in csv.DictReader(lines):
                kind = row.get("op"), row.get("peer"), row.get("metric")
                if kind in (("rollout", "ours", "ms"), ("update", "ours", "ms")):
                    key = row["shape"], row["device"], row["dtype"]
                    rows.setdefault(key, {})[row["op"]] = row
    pairs = {key: pair for key, pair in rows.items() if len(pair) == 2}
    if not pairs:
        names = ", ".join(map(str, files))
        raise UserError(f"{names}: no shape with rows of `ours` in ms for both op rollout and op update")
    key = max(pairs, key=lambda key: min(row["date"] for row in pairs[key].values()))
    shape, where, dtype = parse_shape(key[0]), key[1], getattr(torch, key[2])
    groups = sizes_of(shape)
    weights = ModelSize.of(meta_policy(model_config(shape.model), dtype))
    seconds = {op: float(row["p50"]) / 1e3 for op, row in pairs[key].items()}
    return Start(
        f"rows of {key[0]}, {where}, medians",
        Work(weights, groups, sum(group.prompt + sum(group.lengths) for group in groups)),
        Measured(len(groups), seconds["rollout"], 0.0, seconds["update"]),
        known_rates(device or where, dtype),
    )


def parse_shape(text: str) -> Shape:
    """The shape of a bench's row. Raises UserError for one that no bench writes."""
    match = re.fullmatch(r"(\S+) prompts=\S+ G=(\d+) completion=(\d+)", text)
    for base in (MID, TINY, TWO_B):
        if match and base.model == match[1]:
            shape = replace(base, G=int(match[2]), completion=int(match[3]))
            if str(shape) == text:
                return shape
    raise UserError(f"{text}: is not a shape of the benches")


def sizes_of(shape: Shape) -> list[GroupSize]:
    return [
        GroupSize(text + rows * columns // 4, [shape.completion] * shape.G, [rows * columns])
        for text, (rows, columns) in zip(shape.text, shape.grids, strict=True)
    ]


def estimate(model: str, device: str, prompts: int, lengths: str, efficiency: tuple[float, float], seed: int) -> Start:
    """A step of `prompts` prompts (an image of 2,048 patches and 100 tokens of text, G = 8) from floors alone."""
    rates = known_rates(device, torch.bfloat16)
    weights = ModelSize.of(meta_policy(model_config(model), torch.bfloat16))
    rng = np.random.default_rng(seed)
    prompt, G = 100 + 2048 // 4, 8
    groups = [GroupSize(prompt, draw(lengths, G, rng), [2048]) for _ in range(512)]
    budget = prompt + max(sum(group.lengths) for group in groups)
    held = [groups[i : i + prompts] for i in range(0, len(groups) - prompts + 1, prompts)]
    rollouts = [(prefill_floor(weights, rates, batch) + decode_floor(weights, rates, batch)).seconds for batch in held]
    updates = [sum(micro_batch_floor(weights, rates, [group]).seconds for group in batch) for batch in held]
    work = Work(weights, groups, budget)
    optimizer = optimizer_floor(weights, rates).seconds
    assumed = f"rollouts at {efficiency[0]:.0%}, updates at {efficiency[1]:.0%} of the floor's speed"
    return Start(
        f"floors of {model} on {device}, {assumed}, completions {lengths}",
        work,
        Measured(
            prompts,
            rollout=float(np.mean(rollouts)) / efficiency[0],
            score=0.0,
            update=float(np.mean(updates)) / efficiency[1] + optimizer,
        ),
        rates,
        is_estimate=True,
    )


def draw(lengths: str, count: int, rng: np.random.Generator) -> list[int]:
    """Lengths from `fixed:N`, `uniform:LOW:HIGH` or `exponential:MEAN`, at least one token each."""
    kind, *numbers = lengths.split(":")
    try:
        values = [float(number) for number in numbers]
        drawn = {
            ("fixed", 1): lambda n: np.full(count, n),
            ("uniform", 2): lambda low, high: rng.uniform(low, high, count),
            ("exponential", 1): lambda mean: rng.exponential(mean, count),
        }[kind, len(values)](*values)
        return [max(1, round(value)) for value in drawn]
    except (KeyError, ValueError, OverflowError):
        raise UserError(f"--lengths {lengths}: must be fixed:N, uniform:LOW:HIGH or exponential:MEAN") from None


def known_rates(device: str, dtype: torch.dtype) -> Rates:
    rates = data_sheet(device, dtype)
    if rates is None:
        raise UserError(f"device {device}: has no data sheet; name one with --device: {', '.join(DEVICES)}")
    return rates
