"""`python -m bench step`: a whole optimizer step, compared with TRL's GRPOTrainer and the original recipe's structure.

Every contestant samples G completions of a fixed length for the same prompts with an image, computes rewards and
advantages, scores the reference model (KL weight 0.04), and updates the same weights with AdamW.
    ours       `vtfast.trainer.Trainer` (_ours.py)
    trl        `trl.GRPOTrainer.train()`, generation by transformers (_trl.py)
    original   as in VisualThinker-R1-Zero's code: G generates of batch 1, padding, whole logits (_original.py)
Before the timing the tests must pass, and two steps on given completions must move all weights alike (fp32).
On a GPU: Qwen2-VL-2B's sizes with random weights, in bf16. Rows are appended to results/step.csv, and results/step.png
shows the time of each by phase.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib.util
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
import transformers
from torch import Tensor, nn

from bench._harness import (
    GOALS_MISSED,
    NO_NUMBERS,
    RESULTS,
    absence,
    alternate,
    append,
    device_name,
    paired_ratio,
    quantiles,
    tests_pass,
    versions,
)
from bench._phases import Phases
from bench._task import Optimizer, Task, given_completions, make_task
from bench._workload import MID, SIZES, Shape

PHASES = ("data", "rollout", "rewards", "reference", "update", "optimizer", "rest")
"""`data`: images and text to tensors. `update`: forward and backward. `rest`: advantages, metrics, bookkeeping."""
CONTESTANTS = {"ours": "_ours:Ours", "trl": "_trl:TRL", "original": "_original:Original"}
TESTS = ("training/test_step.py", "model/test_scoring.py", "rollout/test_rollout.py")
GOALS = {"mid": {"trl": 1 / 3, "original": 1 / 8}}
"""On the CPU, our time / theirs, by model."""
PROPORTIONAL = Optimizer(learning_rate=0.3, adam_epsilon=1.0, max_grad_norm=0.0)
"""AdamW whose update is proportional to the gradient, so that the weights show the gradients."""
CHECKED_TOKENS = 8
TOLERANCE = 1e-4


class Contestant(Protocol):
    """Built from (task, phases). `step` records itself in its phases."""

    module: nn.Module

    def step(self) -> None: ...

    def close(self) -> None: ...


@contextlib.contextmanager
def seats(task: Task) -> Iterator[tuple[dict[str, tuple[Contestant, Phases]], dict[str, str]]]:
    """The contestants that run here, and the reasons why others do not. An error of ours is raised."""
    players: dict[str, tuple[Contestant, Phases]] = {}
    absent: dict[str, str] = {}
    try:
        for name in CONTESTANTS:
            phases = Phases(device=task.device)
            try:
                players[name] = contestant(name)(task, phases), phases
            except Exception as error:  # a peer that cannot run must not stop the others
                if name == "ours":
                    raise
                absent[name] = absence(name, error)
        yield players, absent
    finally:
        for player, _ in players.values():
            player.close()


def take_step(name: str, players: dict[str, tuple[Contestant, Phases]], absent: dict[str, str]) -> None:
    """Let a contestant take a step. A peer that fails, such as for lack of memory, is removed and its memory freed."""
    if name in absent:
        return
    try:
        players[name][0].step()
        return
    except Exception as error:
        if name == "ours":
            raise
        absent[name] = absence(name, error)
    player, _ = players.pop(name)
    player.close()
    del player
    gc.collect()


def contestant(name: str) -> type[Contestant]:
    module, kind = CONTESTANTS[name].split(":")
    return getattr(importlib.import_module(f"bench.{module}"), kind)


def disagreements(shape: Shape, device: str, threads: int) -> dict[str, float]:
    """`distance` of each peer's weights from ours after two steps on the same completions.

    In the first step the KL is 0, since the policy still is the reference; the second one checks the whole loss."""
    shape = replace(shape, completion=CHECKED_TOKENS)
    moves: dict[str, dict[str, Tensor]] = {}
    with make_task(shape, device, threads, torch.float32) as task:
        given = replace(task, optimizer=PROPORTIONAL, completions=given_completions(shape))
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # the peers embed patches by a convolution
        with exact, seats(given) as (players, absent):
            for name in list(players):
                before = weights(players[name][0].module)
                take_step(name, players, absent)
                take_step(name, players, absent)
                if name in players:
                    after = weights(players[name][0].module)
                    moves[name] = {key: w - before[key] for key, w in after.items()}
    ours = moves.pop("ours")
    return {name: distance(ours, theirs) for name, theirs in moves.items()}


def distance(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest difference of a weight tensor's change, relative to the change or, if that is small, to the average
    change. NaN if any value is."""
    sizes = torch.stack([move.norm() for move in theirs.values()])
    apart = torch.stack([(ours[name] - move).norm() for name, move in theirs.items()])
    return float((apart / sizes.clamp(min=sizes.mean())).max())


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def agree(shape: Shape, device: str, threads: int) -> bool:
    """Whether all contestants that run here train alike; prints the differences."""
    distances = disagreements(shape, device, threads)
    for name, value in distances.items():
        print(f"  ours and {name}: weights differ by {value:.1e} of their change in two steps")
    if distances and all(value <= TOLERANCE for value in distances.values()):
        return True
    print("  they do not compute the same: no numbers" if distances else "  no peer: no numbers")
    return False


def measure(
    shape: Shape, device: str, rounds: int, slow_rounds: int, threads: int
) -> tuple[dict[str, Phases], dict[str, str]]:
    """Phases of every step in alternating rounds, and the reasons why some peers have none.

    If `original` takes part in the first `slow_rounds` only, it is not warmed up: the check has run its code, and on a
    GPU one of its steps takes a minute."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with make_task(shape, device, threads, dtype) as task, seats(task) as (players, absent):
        for name, (_, phases) in list(players.items()):
            if name != "original" or slow_rounds >= rounds:
                take_step(name, players, absent)
                phases.steps.clear()
        steps = {name: functools.partial(take_step, name, players, absent) for name in players}
        alternate(steps, rounds, device, limits={"original": slow_rounds})
        return {name: phases for name, (_, phases) in players.items()}, absent


def report(shape: Shape, device: str, measured: Mapping[str, Phases], absent: Mapping[str, str]) -> bool:
    """Print tables and append rows to step.csv -> whether the goals are met."""
    times = {name: phases.totals() for name, phases in measured.items()}
    print(f"\nstep, {shape}, {device_name(device)}, {len(times['ours'])} rounds")
    print(f"  {'':<10}{'p20 s':>9}{'p50 s':>9}{'p80 s':>9}{'ours / it':>24}{'goal':>8}")
    goals = GOALS.get(shape.model, {}) if device == "cpu" else {}
    rows, met = [], True
    for name, values in times.items():
        ratio, low, high = paired_ratio(times["ours"][: len(values)], values)
        cells = "".join(f"{value:>9.3f}" for value in quantiles(values))
        goal, shown = goals.get(name), f"{ratio:.3f} [{low:.3f}, {high:.3f}]"
        verdict = "" if goal is None else f"{goal:.3f}, {'met' if ratio <= goal else 'NOT met'}"
        met &= goal is None or ratio <= goal
        print(f"  {name:<10}{cells}{shown:>24}   {verdict}")
        paired = {"ratio": ratio, "ratio_low": low, "ratio_high": high}
        rows.append(_row(shape, device, name, "ms", values) | paired)
    print("\n  seconds by phase (medians)\n  " + " " * 10 + "".join(f"{p:>11}" for p in PHASES))
    for name, phases in measured.items():
        medians = phases.medians(PHASES)
        print(f"  {name:<10}" + "".join(f"{medians[phase]:>11.3f}" for phase in PHASES))
        for phase in PHASES:
            values = [step.get(phase, 0.0) for step in phases.steps]
            rows.append(_row(shape, device, name, f"{phase} ms", values))
    rows += [_row(shape, device, name, reason, ()) for name, reason in absent.items()]
    append("step.csv", rows)
    return met


def picture(measured: Mapping[str, Mapping[str, Phases]], device: str, path: Path) -> None:
    """Draw one panel per size with a bar per contestant, split by phase."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(measured), figsize=(9, 0.8 + 1.6 * len(measured)), squeeze=False)
    for panel, (title, contestants) in zip(panels[:, 0], measured.items(), strict=True):
        names, left = list(contestants), [0.0] * len(contestants)
        medians = [phases.medians(PHASES) for phases in contestants.values()]
        for number, phase in enumerate(PHASES):
            widths = [each[phase] for each in medians]
            panel.barh(names, widths, left=left, label=phase, color=f"C{number}", height=0.7)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for row, total in enumerate(left):
            panel.text(total, row, f" {total / left[0]:.1f}x", va="center", fontsize=8)
        panel.invert_yaxis()
        panel.margins(x=0.08)
        panel.set_title(title, fontsize=9, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1, 0].set_xlabel(f"seconds a step, {device_name(device)}")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=len(PHASES), loc="upper center", frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / figure.get_figheight()))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def quiet() -> None:
    """Turn off the peers' progress bars and deprecation warnings, which hide the tables."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if importlib.util.find_spec("datasets"):
        importlib.import_module("datasets").disable_progress_bars()


def parse_one_run(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, Shape, torch.dtype]:
    """Options, shape and dtype of a bench that runs our trainer alone; sets the threads."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--size", choices=SIZES, help="mid; 2B on a GPU")
    parser.add_argument("--threads", type=int, default=min(2, torch.get_num_threads()))
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    quiet()
    on_gpu = options.device == "cuda"
    shape = SIZES[options.size or ("2B" if on_gpu else "mid")]
    return options, shape, torch.bfloat16 if on_gpu else torch.float32


def _row(shape: Shape, device: str, peer: str, metric: str, seconds: Sequence[float]) -> dict[str, object]:
    values = [1e3 * value for value in quantiles(seconds)] if seconds else []
    return {
        "op": "step",
        "peer": peer,
        "shape": str(shape),
        "dtype": "bfloat16" if device == "cuda" else "float32",
        "metric": metric,
        **dict(zip(("p20", "p50", "p80"), values, strict=False)),
        "device": device_name(device),
        "versions": versions("torch", "transformers", "trl", "deepspeed", "flash-attn"),
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench step", description=__doc__.split("\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="tiny and mid; 2B on a GPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slow-rounds", type=int, help="rounds that include the original; all, or 1 on a GPU")
    parser.add_argument("--threads", type=int, default=min(2, torch.get_num_threads()))
    parser.add_argument("--no-tests", action="store_true", help="skip the tests; the numbers must not be quoted")
    options = parser.parse_args(argv)
    on_gpu = options.device == "cuda"
    sizes = options.sizes or (["2B"] if on_gpu else ["tiny", "mid"])
    slow_rounds = options.slow_rounds or (1 if on_gpu else options.rounds)
    torch.set_num_threads(options.threads)
    quiet()
    if not options.no_tests and not tests_pass(TESTS):
        return NO_NUMBERS
    measured, met = {}, []
    for size in sizes:
        shape = SIZES[size]
        # bf16 rounds too much to tell a wrong gradient from a right one: on a GPU the check uses a small model in fp32.
        if not agree(MID if size == "2B" else shape, options.device, options.threads):
            return NO_NUMBERS
        arguments = shape, options.device, options.rounds, slow_rounds, options.threads
        measured[str(shape)], absent = measure(*arguments)
        met.append(report(shape, options.device, measured[str(shape)], absent))
    if importlib.util.find_spec("matplotlib"):
        picture(measured, options.device, RESULTS / "step.png")
    else:
        print("no picture: matplotlib is not installed")
    return 0 if all(met) else GOALS_MISSED
