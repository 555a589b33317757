"""A table of held-out results by kind of question, and curves.png."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it imports torch, which a report does not need
    from matplotlib.axes import Axes

    from vtfast.evaluate.held_out import HeldOutScores


def held_out_table(before: HeldOutScores, after: HeldOutScores) -> str:
    """Accuracy and format before -> after training by kind of question, then two summary lines."""
    lines = [
        f"{'held-out (' + str(after.count) + ')':<16}{'sampled':^31}{'greedy':^31}",
        f"{'':<16}{'accuracy':^15}{'format':^16}{'accuracy':^15}{'format':^16}",
    ]
    for kind in after.scores["sampled"]:
        cells = [
            f"{before.scores[mode][kind][i]:.2f} -> {after.scores[mode][kind][i]:.2f}"
            for mode in ("sampled", "greedy")
            for i in (0, 1)
        ]
        lines.append(f"{kind:<16}" + " ".join(f"{cell:^15}" for cell in cells))
    for name in ("accuracy", "format"):
        sampled, greedy = (
            f"{getattr(before, name)(mode):.2f} -> {getattr(after, name)(mode):.2f}" for mode in ("sampled", "greedy")
        )
        lines.append(f"held-out {name}: {sampled}  (sampled; greedy {greedy})")
    return "\n".join(lines)


def draw_curves(folder: Path, before: HeldOutScores | None, after: HeldOutScores | None) -> Path:
    """`folder`/curves.png from metrics.jsonl: rewards, length and entropy, time by phase, and the held-out bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    x = [line["step"] for line in steps]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")

    rewards = axes[0, 0]
    for key in (key for key in steps[0] if key.startswith("rewards/") and not key.endswith(("/failed", "/std"))):
        rewards.plot(x, [line[key] for line in steps], label=key.removeprefix("rewards/"))
    rewards.set(title="Reward in training", xlabel="step", ylim=(0, None))
    rewards.legend()

    length = axes[0, 1]
    length.plot(x, [line["completions/mean_length"] for line in steps], color="tab:green", label="length")
    length.set(title="Completion length and entropy", xlabel="step", ylabel="tokens", ylim=(0, None))
    entropy = length.twinx()
    entropy.plot(x, [line["entropy"] for line in steps], color="tab:red", label="entropy")
    entropy.set(ylabel="entropy (nats)", ylim=(0, None))
    length.legend(handles=[*length.lines, *entropy.lines], loc="center right")

    phases = [key for key in ("time/rollout", "time/score", "time/update") if key in steps[0]]
    axes[1, 0].stackplot(
        x, [[line[key] for line in steps] for key in phases], labels=[key.removeprefix("time/") for key in phases]
    )
    axes[1, 0].set(title="Where a step's time goes", xlabel="step", ylabel="seconds")
    axes[1, 0].legend(loc="upper right")

    if before and after:
        _held_out_bars(axes[1, 1], before, after)
    else:
        axes[1, 1].plot(x, [line["kl"] for line in steps])
        axes[1, 1].set(title="KL divergence from the starting model", xlabel="step")
    path = folder / "curves.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _held_out_bars(axis: Axes, before: HeldOutScores, after: HeldOutScores) -> None:
    kinds = list(after.scores["greedy"])
    bars = [
        ("before, sampled", before, "sampled", "lightsteelblue"),
        ("before, greedy", before, "greedy", "steelblue"),
        ("after, sampled", after, "sampled", "navajowhite"),
        ("after, greedy", after, "greedy", "darkorange"),
    ]
    for i, (label, result, mode, colour) in enumerate(bars):
        positions = [k + (i - 1.5) * 0.2 for k in range(len(kinds))]
        axis.bar(positions, [result.accuracy(mode, kind) for kind in kinds], 0.2, label=label, color=colour)
    axis.set_xticks(range(len(kinds)), kinds)
    axis.set(title=f"Held-out accuracy ({after.count} questions)", ylim=(0, 1.4))
    axis.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axis.legend(fontsize="small", loc="upper center", ncols=2)
