"""The numbers of a step, over all ranks. The names of metrics.jsonl are TRL's where TRL has one."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vtfast.cost.flops import forward_multiples, part_update_flops
from vtfast.distributed import watchdog
from vtfast.distributed.ranks import Ranks
from vtfast.model.policy import Policy
from vtfast.training.groups import Group, MicroBatch
from vtfast.training.grpo_objective import SUMS


class Timer:
    """Seconds spent in named phases of a step; on CUDA the device is waited for at the phase's end."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        watchdog.beat(name.removeprefix("time/"))
        start = time.perf_counter()
        yield
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def memory_gb(device: torch.device) -> float:
    """Peak memory so far: the allocator's on CUDA, the process's resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def process_metrics(device: torch.device) -> dict[str, float]:
    """What this process holds: its peak, and for long runs what must not grow from step to step."""
    import psutil  # what needs no such numbers runs without it

    process = psutil.Process()
    return {
        "memory_gb": memory_gb(device),
        "resident_gb": process.memory_info().rss / 1e9,
        "open_files": process.num_fds(),
    }


def step_metrics(
    groups: Sequence[Group], sums: Mapping[str, float], reward_names: Sequence[str], ranks: Ranks
) -> dict[str, float | None]:
    """What the answers of a step were like. `sums`: this rank's result of the update.

    Means over tokens are None when no token was scored, since no group had a signal; those over answers are when no
    question could be used.
    """
    parts: list[dict[str, Any]] = ranks.gather(
        {
            "total": [group.total for group in groups],
            "rewards": [group.rewards for group in groups],
            "failed": sum(len(failures) for group in groups for failures in group.failures),
            "lengths": [length for group in groups for length in group.lengths],
            "clipped": [c.finish_reason == "length" for group in groups for c in group.completions],
            "sums": dict(sums),
        }
    )
    total = _stacked(row for part in parts for row in part["total"])  # [questions, G]
    rewards = _stacked(row for part in parts for row in part["rewards"])  # [questions, functions, G]
    lengths = [length for part in parts for length in part["lengths"]]
    clipped = [flag for part in parts for flag in part["clipped"]]
    summed = {key: sum(part["sums"][key] for part in parts) for key in sums}
    scored = summed["scored_tokens"]
    spread = None if total is None else total.std(dim=1)  # [questions]
    metrics = {"reward": _mean(total), "reward_std": _mean(spread)}
    for i, name in enumerate(reward_names):
        of_all = None if rewards is None else rewards[:, i]
        metrics[f"rewards/{name}"] = _mean(of_all)
        metrics[f"rewards/{name}/std"] = None if of_all is None else float(of_all.std())
    return metrics | {
        "rewards/failed": sum(part["failed"] for part in parts),
        "frac_reward_zero_std": None if spread is None else _mean(spread == 0),
        "completions/mean_length": sum(lengths) / len(lengths) if lengths else None,
        "completions/clipped_ratio": sum(clipped) / len(clipped) if clipped else None,
        **{key: summed[key] / scored if scored else None for key in SUMS},
        "sampler_drift_max": max(part["sums"]["sampler_drift_max"] for part in parts),
        "loss": summed["loss"] if lengths else None,
        "num_tokens": sum(lengths),
    }


def _stacked(rows: Iterable[Tensor]) -> Tensor | None:
    rows = list(rows)
    return torch.stack(rows) if rows else None


def _mean(values: Tensor | None) -> float | None:
    return None if values is None else float(values.float().mean())


def summary(metrics: Mapping[str, float | None]) -> str:
    """The few numbers beside the progress bar."""
    if metrics["reward"] is None:
        return "no question could be used"
    rewards = [key for key in metrics if key.startswith("rewards/") and not key.endswith(("/failed", "/std"))]
    parts = [f"reward {metrics['reward']:.2f}"]
    parts += [f"{key.removeprefix('rewards/')} {metrics[key]:.2f}" for key in rewards]
    parts += [f"length {metrics['completions/mean_length']:.0f}"]
    return ", ".join([*parts, f"{metrics['tokens_per_second']:.0f} tok/s"])


def update_flops(
    policy: Policy, batches: Iterable[MicroBatch], prompt_targets: int = 0, vision_cached: bool = True
) -> float:
    """Forward and backward of one update over these rows.

    A trained part counts 3 forwards, a frozen one that gradients pass through 2 (LoRA's own weights are nothing beside
    it), a frozen vision tower 1, or none if it ran before, in a rollout (`vision_cached`).
    `prompt_targets`: tokens of prompts that meet the head besides the completions.
    """
    total = 2.0 * prompt_targets * policy.head.numel() * forward_multiples(policy)[1]
    for batch in batches:
        for part in batch.parts:
            group = batch.groups[part.group]
            prompt = group.question.prompt
            lengths = [group.lengths[i] for i in part.members]
            total += part_update_flops(policy, len(prompt.ids), lengths, prompt.patches, vision_cached)
    return total


def completion_rows(step: int, groups: Sequence[Group], reward_names: Sequence[str]) -> list[dict]:
    return [
        {
            "step": step,
            "row": group.question.sample.row,
            "kind": group.question.sample.kind,
            "question": group.question.sample.question,
            "answer": group.question.sample.answer,
            "completion": text,
            "reward": float(group.total[g]),
            "rewards": {name: float(group.rewards[i, g]) for i, name in enumerate(reward_names)},
            "failed": group.failures[g],
            "advantage": float(group.advantage[g]),
            "length": len(group.completions[g].tokens),
            "prompt_length": len(group.question.prompt.ids),
            "patches": group.question.prompt.patches,
            "finish_reason": group.completions[g].finish_reason,
        }
        for group in groups
        for g, text in enumerate(group.texts)
    ]
