"""`python -m bench roofline RUN`: how close each phase of a run came to the device's limits.

Work, times and rates come from the run folder's own files (config.yaml, metrics.jsonl, completions.jsonl and a
checkpoint's config.json): no weights are loaded and nothing is run. The floors of each step are those of
vtfast/cost/roofline.py; RUN/roofline.md and RUN/roofline.png show means over all steps but the first. The shares that
the run logged are compared with these: a difference of more than a tenth is an error.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from bench._recorded_run import Recorded, Step, read_recorded
from vtfast.cost.devices import DEVICES
from vtfast.cost.roofline import PHASES, Floor, step_floors
from vtfast.training.speed import phase_seconds, shares
from vtfast.utils.errors import UserError

ROWS = (
    ("rollout", "rollout"),
    ("prefill", "- prefill (rank 0)"),
    ("decode", "- decode (rank 0)"),
    ("score", "score"),
    ("update", "update"),
    ("optimizer", "- optimizer"),
    ("link", "- all-gather"),
)
TOLERANCE = 0.1


def floors_of(run: Recorded, step: Step) -> dict[str, Floor]:
    return step_floors(run.weights, run.rates, run.config, step.everyone, step.fresh)


def differences(run: Recorded) -> dict[int, float]:
    """Step -> the largest relative difference between a share that the run logged and the one computed here. Nothing is
    compared if `--device` names another device than the run's."""
    largest: dict[int, float] = {}
    for step in run.steps:
        if step.metrics.get("roofline/flops") != run.rates.flops:
            continue
        for name, computed in shares(floors_of(run, step), phase_seconds(step.metrics)).items():
            logged = step.metrics.get(name)
            if (computed is None) != (logged is None):
                difference = float("inf")
            else:
                difference = abs(computed - logged) / logged if logged else 0.0
            largest[step.number] = max(largest.get(step.number, 0.0), difference)
    return largest


def averages(run: Recorded) -> tuple[dict[str, Floor], dict[str, float]]:
    """Mean floors and mean measured seconds of a step by phase; `rest` is the time outside all phases."""
    floors: dict[str, Floor] = defaultdict(Floor)
    seconds: dict[str, float] = defaultdict(float)
    steps = run.settled
    for step in steps:
        for name, floor in floors_of(run, step).items():
            floors[name] += floor.times(1 / len(steps))
        for name, value in phase_seconds(step.metrics).items():
            seconds[name] += value / len(steps)
    seconds["rest"] = seconds["step"] - sum(seconds[name] for name in PHASES)
    return dict(floors), dict(seconds)


def page(run: Recorded) -> str:
    """The page as Markdown."""
    floors, seconds = averages(run)
    rates, steps = run.rates, run.settled
    link = "" if rates.link is None else f", link {rates.link / 1e9:.3g} GB/s"
    lines = [
        f"# Roofline of {run.name}",
        "",
        f"Rates ({rates.source}): {rates.flops / 1e12:.4g} TFLOP/s, {rates.bandwidth / 1e9:.4g} GB/s{link}."
        f" {run.ranks} rank(s), steps {steps[0].number} to {steps[-1].number}, means.",
        "",
        "| phase | floor ms | bound by | measured ms | share of the floor's speed |",
        "|---|---:|---|---:|---:|",
    ]
    for name, shown in ROWS:
        floor = floors.get(name, Floor())
        if floor.seconds == 0 and not seconds.get(name):
            continue
        lines.append(_row(shown, floor, seconds.get(name)))
    lines.append(f"| rest | | | {seconds['rest'] * 1e3:.4g} | |")
    total = Floor()
    for name in PHASES:
        total += floors.get(name, Floor())
    lines.append(_row("step", total, seconds["step"]))
    logged = differences(run)
    if logged:
        largest = f"they differ from this page by at most {max(logged.values()):.2%}"
        lines += ["", f"Steps whose shares the run logged: {len(logged)}; {largest}."]
    return "\n".join(lines) + "\n"


def _row(name: str, floor: Floor, seconds: float | None) -> str:
    """A row of the table. A phase without work has no floor; a part that is not timed has no measured time."""
    measured = f"{seconds * 1e3:.4g}" if seconds else ""
    if floor.seconds == 0:
        return f"| {name} | | | {measured} | |"
    share = f"{floor.seconds / seconds:.1%}" if seconds else ""
    return f"| {name} | {floor.seconds * 1e3:.4g} | {floor.bound} | {measured} | {share} |"


def draw(floors: Mapping[str, Floor], seconds: Mapping[str, float], path: Path) -> None:
    """Draw floor and measured time by phase."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in ("prefill", "decode", *PHASES) if seconds.get(name)]
    figure, axis = plt.subplots(figsize=(7, 0.7 * len(names) + 1), layout="constrained")
    for i, name in enumerate(names):
        floor = floors.get(name, Floor())
        axis.barh(i - 0.2, floor.seconds * 1e3, 0.4, color="tab:green", label="floor" if not i else None)
        axis.barh(i + 0.2, seconds[name] * 1e3, 0.4, color="tab:gray", label="measured" if not i else None)
        axis.text(seconds[name] * 1e3, i + 0.2, f" {floor.seconds / seconds[name]:.0%}", va="center")
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel("ms a step")
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench roofline", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--device", help=f"use the rates of its data sheet: {', '.join(DEVICES)}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights")
    parser.add_argument("--output", type=Path, help="folder for roofline.md and roofline.png (default RUN)")
    options = parser.parse_args(argv)
    try:
        run = read_recorded(options.run, options.device, options.dtype)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    output = options.output or options.run
    output.mkdir(parents=True, exist_ok=True)
    text = page(run)
    (output / "roofline.md").write_text(text)
    draw(*averages(run), output / "roofline.png")
    print(text)
    logged = differences(run)
    if logged and max(logged.values()) > TOLERANCE:
        print("the shares that the run logged differ from this page by more than a tenth", file=sys.stderr)
        return 1
    return 0
