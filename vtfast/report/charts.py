"""The charts of the page as JSON values; `assets/charts.js` draws them.

With one run a chart may show several quantities; with several runs it shows one quantity with a line per run.
Quantities that no run has logged have no chart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vtfast.evaluate import published_scores
from vtfast.report.completions import Completions
from vtfast.report.read_run import Run, number
from vtfast.report.reflection import THRESHOLD, WORDS
from vtfast.utils.files import step_of

POINTS = 4000
"""Most points of a line; longer ones are averaged over equal intervals of steps."""
STACKED_POINTS = 150
"""The same for stacked areas."""

Chart = dict[str, Any]
Line = dict[str, Any]

TRAINING = (
    ("Spread of rewards in a group", "", {"standard deviation": "reward_std"}),
    ("Groups without a signal", "%", {"share": "frac_reward_zero_std"}),
    ("KL divergence from the starting model", "nats a token", {"KL": "kl"}),
    ("Entropy", "nats a token", {"entropy": "entropy"}),
    ("Clipped tokens", "%", {"ratio too low": "clip_ratio/low", "ratio too high": "clip_ratio/high"}),
    ("Answers cut off at the length limit", "%", {"cut off": "completions/clipped_ratio"}),
    ("Gradient norm", "", {"norm": "grad_norm"}),
    ("Sampler drift", "nats a token", {"mean": "sampler_drift", "largest": "sampler_drift_max"}),
    ("Rewards that failed", "", {"failed": "rewards/failed"}),
    ("Loss", "", {"loss": "loss"}),
    ("Token accuracy", "%", {"accuracy": "mean_token_accuracy"}),
    ("Learning rate", "", {"learning rate": "learning_rate"}),
)
"""(title, unit, {line: key in metrics.jsonl}). Values with the unit % are fractions in [0, 1]."""
DEVICE = (
    ("Speed", "tokens a second", {"tokens": "tokens_per_second"}),
    ("Use of the device's peak (MFU)", "%", {"MFU": "mfu"}),
    ("Peak memory", "GB", {"memory": "memory_gb"}),
)
"""Likewise."""


def accuracy_charts(runs: Sequence[Run]) -> list[Chart]:
    """Benchmark totals over the evaluated steps, with the study's result as a dashed line."""

    def totals(run: Run, bench: str) -> tuple[list[int], list[Any]]:
        points = [
            (step, scores[bench].get("total"))
            for name, scores in run.evaluations.items()
            if (step := step_of(name)) is not None and bench in scores
        ]
        return [x for x, _ in points], [y for _, y in points]

    present = {bench for run in runs for scores in run.evaluations.values() for bench in scores}
    benches = [bench for bench in published_scores.TITLES if bench in present]
    benches += sorted(present - set(published_scores.TITLES))
    lines = {bench: [_line(run.name, *totals(run, bench), i) for i, run in enumerate(runs)] for bench in benches}
    if len(runs) == 1:
        one = [
            line | {"label": published_scores.TITLES.get(bench, bench), "colour": i}
            for i, (bench, (line,)) in enumerate(lines.items())
        ]
        marks = [_mark(bench, i) for i, bench in enumerate(benches) if bench in published_scores.RESULT]
        return _charts([_chart("Benchmark accuracy", "%", one, marks)])
    return _charts(
        _chart(
            f"{published_scores.TITLES.get(bench, bench)} accuracy",
            "%",
            lines[bench],
            [_mark(bench, None)] if bench in published_scores.RESULT else [],
        )
        for bench in benches
    )


def length_chart(runs: Sequence[Run], labels: Sequence[str]) -> list[Chart]:
    """Response length over steps. `labels`: a name for each run, such as the parts that it froze."""
    lines = [
        _line(label, *_metric(run, "completions/mean_length"), i)
        for i, (run, label) in enumerate(zip(runs, labels, strict=True))
    ]
    return _charts([_chart("Response length", "tokens", lines)])


def reward_charts(runs: Sequence[Run]) -> list[Chart]:
    keys = dict.fromkeys(
        key
        for run in runs
        for row in run.metrics[-1:]
        for key in row
        if key.startswith("rewards/") and not key.endswith(("/failed", "/std"))
    )
    names = {"total": "reward", **{key.removeprefix("rewards/"): key for key in keys}}
    return _quantity(runs, "Reward", "", names)


def training_charts(runs: Sequence[Run]) -> list[Chart]:
    """The quantities of TRAINING that were logged."""
    return [chart for title, unit, names in TRAINING for chart in _quantity(runs, title, unit, names)]


def is_zero(chart: Chart) -> bool:
    """Whether all values are 0 or unknown."""
    return not any(y for line in chart["lines"] for y in line["y"])


def time_charts(runs: Sequence[Run]) -> list[Chart]:
    """Seconds of a step by phase, stacked, one chart per run; then speed and memory."""
    charts = []
    for run in runs:
        phases = dict.fromkeys(key for row in run.metrics[-1:] for key in row if key.startswith("time/"))
        phases.pop("time/step", None)
        lines = [_line(key.removeprefix("time/"), *_metric(run, key, missing=0.0), i) for i, key in enumerate(phases)]
        rest = [
            None
            if row.get("time/step") is None
            else max(0.0, row["time/step"] - sum(row.get(key) or 0.0 for key in phases))
            for row in run.metrics
        ]
        lines.append(_line("other", [row["step"] for row in run.metrics], rest, len(phases)))
        title = "Time of a step by phase" + (f": {run.name}" if len(runs) > 1 else "")
        charts.append(_chart(title, "seconds", lines, stacked=True))
    return [
        *_charts(charts),
        *(chart for title, unit, names in DEVICE for chart in _quantity(runs, title, unit, names)),
    ]


def reflection_charts(runs: Sequence[Run], completions: Sequence[Completions]) -> list[Chart]:
    """The share of completions with a reflection word over steps; for one run also the frequency of each word."""
    shares = [
        _line(run.name if len(runs) > 1 else "share", list(of_run.shares), list(of_run.shares.values()), i)
        for i, (run, of_run) in enumerate(zip(runs, completions, strict=True))
    ]
    mark = {"y": THRESHOLD, "label": f"threshold {THRESHOLD:.0%}", "colour": None}
    charts = [_chart("Completions with a reflection word", "%", shares, [mark])]
    if len(runs) == 1 and any(completions[0].reflecting.values()):
        (of_run,) = completions
        per_hundred = [
            _line(
                word,
                list(of_run.words),
                [100 * counts[word] / of_run.per_step[step] for step, counts in of_run.words.items()],
                i,
            )
            for i, word in enumerate(WORDS)
        ]
        used = [line for line in per_hundred if any(line["y"])]
        charts.append(_chart("Reflection words", "times in 100 completions", used, stacked=True))
    return _charts(charts)


def _quantity(runs: Sequence[Run], title: str, unit: str, names: dict[str, str]) -> list[Chart]:
    """For one run, one chart with a line per name; for several, a chart per name with a line per run."""
    if len(runs) == 1:
        lines = [_line(label, *_metric(runs[0], key), i) for i, (label, key) in enumerate(names.items())]
        return _charts([_chart(title, unit, lines)])
    return _charts(
        _chart(
            title if len(names) == 1 else f"{title}: {label}",
            unit,
            [_line(run.name, *_metric(run, key), i) for i, run in enumerate(runs)],
        )
        for label, key in names.items()
    )


def _chart(title: str, unit: str, lines: Sequence[Line], marks: Sequence[Line] = (), stacked: bool = False) -> Chart:
    longest = max((len(line["x"]) for line in lines), default=0)
    size = max(1, -(-longest // (STACKED_POINTS if stacked else POINTS)))
    return {
        "title": title,
        "unit": unit,
        "note": f"means over {size} steps" if size > 1 else "",
        "stacked": stacked,
        "lines": [_thin(line, size) for line in lines],
        "marks": list(marks),
    }


def _charts(charts: Iterable[Chart]) -> list[Chart]:
    """Drop lines without values, and charts without lines."""
    nonempty = []
    for chart in charts:
        lines = [line for line in chart["lines"] if any(y is not None for y in line["y"])]
        if lines:
            nonempty.append(chart | {"lines": lines})
    return nonempty


def _mark(bench: str, colour: int | None) -> Line:
    name = published_scores.TITLES[bench]
    return {"y": published_scores.RESULT[bench] / 100, "label": f"{name}, paper", "colour": colour}


def _metric(run: Run, key: str, missing: float | None = None) -> tuple[list[int], list[Any]]:
    values = [row.get(key) for row in run.metrics]
    return [row["step"] for row in run.metrics], [missing if y is None else y for y in values]


def _line(label: str, x: Sequence[int], y: Sequence[Any], colour: int) -> Line:
    return {"label": label, "colour": colour, "x": list(x), "y": [number(value) for value in y]}


def _thin(line: Line, size: int) -> Line:
    """Means over intervals of `size` steps, each at the interval's first step, with five digits."""
    y = line["y"]
    means = [_mean(y[i : i + size]) for i in range(0, len(y), size)]
    rounded = [None if value is None else float(f"{value:.5g}") for value in means]
    return line | {"x": line["x"][::size], "y": rounded}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
