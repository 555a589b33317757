"""`python -m bench scale`: predicted time of a step on 1 to 1,024 GPUs, and where ZeRO-2 stops paying off.

    --run RUN          start from the phase times and completions of a run folder (on one GPU)
    --rows FILE ...    start from rows of bench/results: `ours` of op rollout and of op update, one shape
    neither            an estimate: floors of vtfast/cost/roofline.py over a stated efficiency; the page says so

Weak scaling keeps the prompts per GPU constant, strong scaling the prompts per step. The page states its assumptions,
then shows a table of each, the number of GPUs from which on communication and waiting take more than a quarter of a
step, and the effect of other choices. scale.md and scale.png are written to --output (default bench/results).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from bench._cluster import HOP, NETWORK_HOP, Cluster
from bench._harness import RESULTS
from bench._recorded_run import read_recorded
from bench._scaling import Choices, Model, Prediction, first_above, reduce_dominates
from bench._scaling_inputs import EFFICIENCY, Start, estimate, from_rows, from_run
from bench._workload import MODELS
from vtfast.cost.devices import DEVICES, LINKS, find_sheet
from vtfast.utils.errors import UserError

GPUS = tuple(2**i for i in range(11))
LIMIT = 0.25
"""Fraction of a step in communication and waiting from which on ZeRO-2 no longer pays off."""


def link_rate(name: str) -> float:
    """Bytes/s of a link, given by a name in LINKS or in GB/s."""
    try:
        rate = LINKS[name] if name in LINKS else float(name) * 1e9
    except ValueError:
        rate = 0.0
    if not rate > 0:
        raise UserError(f"{name}: not a link; give GB/s of one direction, or one of {', '.join(LINKS)}")
    return rate


# The page


def assumptions(start: Start, model: Model) -> list[str]:
    cluster, choices, work, one = model.cluster, model.choices, start.work, start.measured
    p20, p50, p80, top = np.quantile([n for g in work.groups for n in g.lengths], (0.2, 0.5, 0.8, 1))
    link, network, rates = cluster.link / 1e9, cluster.network / 1e9, start.rates
    said = {
        "One GPU": f"""{start.source}. {one.prompts} prompts a step; rollout {one.rollout:.4g} s, score
            {one.score:.4g} s, update {one.update:.4g} s, rest {one.rest:.4g} s.""",
        "Rates": f"{rates.flops / 1e12:.4g} TFLOP/s, {rates.bandwidth / 1e9:.4g} GB/s ({rates.source}).",
        "Links": f"""a GPU sends {link:.4g} GB/s inside a machine of {cluster.node} and {network:.4g} GB/s to other
            machines; a hop takes {HOP * 1e6:.3g} or {NETWORK_HOP * 1e6:.3g} us.""",
        "Gradients": f"""{model.bytes / 1e9:.4g} GB in the precision of the weights; {choices.collective} in every
            pass, as DeepSpeed's ZeRO-2 does. {choices.overlap:.0%} of a backward pass (two thirds of a pass) hides
            them, but for the last bucket of half a billion.""",
        "Weights": "those that are trained, as many bytes, gathered once a step; nothing hides that.",
        "Completions": f"""p20 {p20:.0f}, p50 {p50:.0f}, p80 {p80:.0f}, longest {top:.0f} tokens; whole groups are drawn
            with replacement, up to {model.draws} rollouts for each number of prompts; a step waits for the slowest.""",
        "Score and update": f"""shared out by the trainer's own plan, {work.token_budget:,} tokens a pass; time goes
            with FLOPs.""",
        "AdamW": "1 / n of the states at the memory's bandwidth.",
        "Rest": "whatever else a step does takes as long as on one GPU.",
    }
    return [f"- {name}: {' '.join(text.split())}" for name, text in said.items()]


COLUMNS = (
    "GPUs",
    "prompts",
    "step s",
    "p20 - p80",
    "rollout",
    "score",
    "update",
    "AdamW",
    "waiting",
    "gradients",
    "gather",
    "lost",
    "tokens/s",
    "efficiency",
)


def table(predictions: Sequence[Prediction], efficiency: Sequence[float]) -> list[str]:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---:|" * len(COLUMNS)]
    for p, share in zip(predictions, efficiency, strict=True):
        low, high = p.step + p.spread[0], p.step + p.spread[2]
        parts = (p.rollout, p.score, p.update, p.optimizer, p.waiting, p.reduce, p.gather)
        cells = [f"{p.gpus:,}", f"{p.prompts:,}", f"{p.step:.4g}", f"{low:.4g} - {high:.4g}"]
        cells += [f"{part:.3g}" for part in parts]
        cells += [f"{p.lost:.0%}", f"{p.tokens_per_second:,.0f}", f"{share:.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def efficiencies(predictions: Sequence[Prediction], one: Prediction) -> list[float]:
    """Tokens per second and GPU, relative to those of one GPU."""
    return [p.tokens_per_second / p.gpus / one.tokens_per_second for p in predictions]


def alternatives(model: Model, gpus: Sequence[int]) -> list[str]:
    """Table of the effect of other choices, in weak scaling."""
    prompts, choices, work = model.measured.prompts, model.choices, model.work
    budgets = {n: model.but(replace(work, token_budget=n * work.token_budget)) for n in (2, 4)}
    other = {
        "reduce-scatter in place of all-reduce": replace(choices, collective="reduce-scatter"),
        "gradients once a step": replace(choices, every_pass=False),
        "no overlap of gradients with the backward pass": replace(choices, overlap=0.0),
        "full overlap": replace(choices, overlap=1.0),
    }
    variants = {
        "unchanged": (model, prompts),
        "twice the token budget": (budgets[2], prompts),
        "four times the token budget": (budgets[4], prompts),
        "twice the prompts a GPU (gradient accumulation)": (model, 2 * prompts),
        **{name: (model.but(choices=choice), prompts) for name, choice in other.items()},
    }
    shown = sorted({min(64, gpus[-1]), gpus[-1]})
    head = "| choice | passes | more than a quarter lost from | mostly gradients from |"
    lines = [head + "".join(f" efficiency, {n:,} |" for n in shown)]
    lines.append("|---|---:|---:|---:|" + "---:|" * len(shown))
    for name, (variant, each) in variants.items():
        found = [variant.predict(n, n * each) for n in gpus]
        at = dict(zip(gpus, efficiencies(found, variant.predict(1, each)), strict=True))
        points = _point(first_above(found, LIMIT)), _point(reduce_dominates(found))
        cells = [name, f"{found[-1].passes:.3g}", *points, *(f"{at[n]:.0%}" for n in shown)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _point(prediction: Prediction | None) -> str:
    return "never" if prediction is None else f"{prediction.gpus:,}"


Kinds = Mapping[str, tuple[list[Prediction], list[float]]]
"""Title -> predictions and efficiencies."""


def predictions(start: Start, model: Model, gpus: Sequence[int], strong: int) -> Kinds:
    """Weak and strong scaling."""
    each = model.measured.prompts
    mark = "estimate: " if start.is_estimate else ""
    found = {}
    for title, prompts, one in (
        (f"{mark}weak scaling, {each} prompts a GPU", lambda n: n * each, each),
        (f"{mark}strong scaling, {strong} prompts a step", lambda n: strong, strong),
    ):
        steps = [model.predict(n, prompts(n)) for n in gpus]
        found[title] = steps, efficiencies(steps, model.predict(1, one))
    return found


def page(start: Start, model: Model, gpus: Sequence[int], kinds: Kinds) -> str:
    """Markdown."""
    mark = "estimate: " if start.is_estimate else ""
    lines = [f"# {mark}a step on 1 to {gpus[-1]:,} GPUs", "", *assumptions(start, model)]
    for title, (steps, shares) in kinds.items():
        lines += ["", f"## {title}", "", *table(steps, shares), "", verdict(steps, shares)]
    lines += ["", f"## {mark}other choices, weak scaling", "", *alternatives(model, gpus)]
    return "\n".join(lines) + "\n"


def verdict(steps: Sequence[Prediction], shares: Sequence[float]) -> str:
    quarter, gradients = first_above(steps, LIMIT), reduce_dominates(steps)
    half = next((p for p, share in zip(steps, shares, strict=True) if share < 0.5), None)
    said = [
        f"Communication and waiting stay under {LIMIT:.0%} of the step."
        if quarter is None
        else f"From {quarter.gpus:,} GPUs on, communication and waiting take more than {LIMIT:.0%} of the step."
    ]
    if gradients is not None:
        said.append(f"From {gradients.gpus:,} on, most of that is the gradients of every pass.")
    if half is not None:
        said.append(f"Efficiency is under one half from {half.gpus:,} on.")
        if half.rollout > half.waiting + half.reduce + half.gather:
            said.append("The rollout does not shrink as its rows do: every decode step reads all weights.")
    return " ".join(said)


def picture(kinds: Kinds, path: Path) -> None:
    """Parts of the step's time by GPUs (weak scaling), and the efficiency of both kinds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    title, (weak, _) = next(iter(kinds.items()))
    names = [f"{p.gpus:,}" for p in weak]
    base = np.zeros(len(weak))
    for part in ("rollout", "score", "update", "optimizer", "rest", "waiting", "reduce", "gather"):
        height = np.array([getattr(p, part) for p in weak])
        left.bar(names, height, bottom=base, label=part)
        base += height
    left.set(title=title, xlabel="GPUs", ylabel="seconds a step")
    left.legend()
    for title, (steps, shares) in kinds.items():
        right.plot([p.gpus for p in steps], shares, marker="o", label=title)
    right.set(title="Efficiency", xlabel="GPUs", ylim=(0, 1.05))
    right.set_xscale("log", base=2)
    right.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench scale", description=__doc__.split("\n")[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--run", type=Path, help="a run folder")
    source.add_argument("--rows", type=Path, nargs="+", help="CSV files of bench/results")
    parser.add_argument("--device", help=f"data sheet for the floors: {', '.join(DEVICES)}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of a run's weights")
    parser.add_argument("--gpus", type=int, nargs="+", default=GPUS, help="default 1, 2, 4 ... 1024")
    parser.add_argument("--link", help=f"inside a machine: GB/s, or one of {', '.join(LINKS)}")
    parser.add_argument("--network", default="ndr", help="a GPU's port to other machines, likewise (default ndr)")
    parser.add_argument("--node", type=int, default=8, help="GPUs of a machine (default 8)")
    parser.add_argument(
        "--overlap", type=float, default=0.5, help="fraction of the backward pass that overlaps with gradients"
    )
    parser.add_argument("--strong", type=int, help="prompts of a step in strong scaling (default: 64 GPUs' worth)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=512, help="rollouts simulated for each number of prompts")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for scale.md and scale.png")
    guess = parser.add_argument_group("for an estimate")
    guess.add_argument("--model", choices=MODELS, default="Qwen2-VL-2B")
    guess.add_argument("--prompts", type=int, default=8, help="prompts per GPU and step")
    guess.add_argument("--lengths", default="uniform:100:700", help="fixed:N, uniform:LOW:HIGH or exponential:MEAN")
    guess.add_argument("--efficiency", type=float, nargs=2, default=EFFICIENCY, metavar=("ROLLOUT", "UPDATE"))
    return parser


def start_of(options: argparse.Namespace) -> Start:
    for name in ("node", "prompts", "draws", "strong"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must be at least 1")
    if min(options.gpus) < 1:
        raise UserError(f"--gpus {min(options.gpus)}: must be at least 1")
    if not 0 <= options.overlap <= 1:
        raise UserError(f"--overlap {options.overlap}: must be between 0 and 1")
    if not all(0 < share <= 1 for share in options.efficiency):
        raise UserError("--efficiency: both shares must be above 0 and at most 1")
    if options.run:
        return from_run(read_recorded(options.run, options.device, options.dtype))
    if options.rows:
        return from_rows(options.rows, options.device)
    return estimate(
        options.model,
        options.device or "H100",
        options.prompts,
        options.lengths,
        tuple(options.efficiency),
        options.seed,
    )


def model_of(start: Start, options: argparse.Namespace) -> Model:
    sheet = find_sheet(options.device or ("H100" if start.is_estimate else ""))
    link = options.link or (sheet.link if sheet else "nvlink4")
    cluster = Cluster(link_rate(link), link_rate(options.network), options.node)
    choices = Choices(options.overlap)
    drawn = {"draws": options.draws, "seed": options.seed}
    model = Model(start.work, start.measured, start.rates, cluster, choices, **drawn)
    if model.compute <= 0:
        raise UserError(
            f"the measured update, {start.measured.update:.3g} s, is shorter than AdamW's floor,"
            f" {model.optimizer(1):.3g} s; name the device that it was measured on with --device"
        )
    return model


def main(argv: list[str]) -> int:
    options = build_parser().parse_args(argv)
    try:
        start = start_of(options)
        model = model_of(start, options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    strong = options.strong or 64 * start.measured.prompts
    gpus = sorted(set(options.gpus))
    kinds = predictions(start, model, gpus, strong)
    text = page(start, model, gpus, kinds)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "scale.md").write_text(text)
    picture(kinds, options.output / "scale.png")
    print(text)
    return 0
