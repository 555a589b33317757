"""The metrics of a step, over all ranks: a line of metrics.jsonl. The names are TRL-style.

`METRICS` lists every key; the documentation's table of metrics is made from it.
"""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtfast.cost.devices import mfu
from vtfast.cost.flops import forward_multiples, part_update_flops
from vtfast.distributed import watchdog
from vtfast.distributed.ranks import Ranks
from vtfast.model.policy import Policy
from vtfast.training.groups import MicroBatch, ScoredGroup
from vtfast.training.grpo_objective import SPARSE_SUMS, SUMS
from vtfast.training.load_balancing import StepBatches
from vtfast.training.setup import Session

METRICS = {
    "step": "optimizer step, from 1",
    "reward": "weighted sum of the rewards, mean over completions",
    "reward_std": "standard deviation of that sum over the completions of a prompt, mean over prompts",
    "rewards/NAME": "one reward function, mean over completions",
    "rewards/NAME/std": "its standard deviation over all completions",
    "rewards/failed": "calls of reward functions that raised, hung or died, and scored 0; count",
    "frac_reward_zero_std": "fraction of prompts whose completions all have the same reward",
    "completions/mean_length": "tokens of a completion, mean",
    "completions/clipped_ratio": "fraction of completions that reached max_completion_length",
    "entropy": "entropy of the policy, mean over scored tokens; nats",
    "kl": "k3 estimate of the KL divergence from the reference model, mean over scored tokens; nats; 0 with beta = 0",
    "clip_ratio/low": "fraction of scored tokens whose ratio is clipped from below",
    "clip_ratio/high": "fraction of scored tokens whose ratio is clipped from above",
    "sampler_drift": "|log-prob of the trainer - log-prob of the sampler|, mean over scored tokens; nats",
    "sampler_drift_max": "largest such difference of a token; nats",
    "dropped": "with sparse_tau: probability that the gradient of a token leaves out, at most; mean over scored tokens",
    "dense_rows": "with sparse_tau: fraction of scored tokens whose gradient takes the whole vocabulary",
    "kept": "with sparse_tau: share of the vocabulary that the gradient of the others takes, mean over micro-batches",
    "loss": "value of the loss",
    "num_tokens": "tokens of all completions (SFT: of prompts and targets); count",
    "frac_groups_skipped": "fraction of prompts that are not trained on because their advantages are all 0",
    "skipped_samples": "samples that were skipped in this step, see skipped.jsonl; count",
    "passes": "micro-batches of each rank; count",
    "grad_norm": "norm of the gradient over all ranks, before clipping; null if the step was skipped",
    "learning_rate": "learning rate of this step",
    "time/data": "waiting for the batch; seconds",
    "time/rollout": "sampling and rewards; seconds; 0 in steps that reuse completions",
    "time/score": "advantages, balancing, log-probs of the reference and the old policy; seconds",
    "time/pack": "SFT: tokenizing targets and balancing; seconds",
    "time/update": "forward, backward and optimizer; seconds",
    "time/step": "the whole step without time/data; seconds",
    "rollout/prefill_seconds": "prefill of rank 0's rollout; seconds",
    "rollout/decode_seconds": "decode steps of rank 0's rollout; seconds",
    "tokens_per_second": "num_tokens per second of time/step",
    "mfu": "model FLOP/s of the update / dense bf16 peak of the device; null for devices without a data sheet",
    "nonfinite_steps": "steps skipped so far because a loss or gradient was not finite; count",
    "empty_steps": "steps skipped so far because none of their samples could be used; count",
    "step_left_out": "1 if this step was skipped, else 0",
    "token_budget": "most tokens of a micro-batch",
    "memory_gb": "peak memory: of the allocator on CUDA, of the process on the CPU; GB",
    "resident_gb": "resident memory of the process; GB",
    "open_files": "open file descriptors of the process; count",
    "roofline/rollout": "least time of the rollout on this device / its time; every roofline_steps steps",
    "roofline/score": "least time of time/score / its time",
    "roofline/update": "least time of time/update / its time",
    "roofline/prefill": "least time of the prefill / its time",
    "roofline/decode": "least time of the decode steps / their time",
    "roofline/step": "least time of the whole step / its time",
    "roofline/floor_seconds": "least time of the step on this device; seconds",
    "roofline/flops": "peak of the device; FLOP/s",
    "roofline/bandwidth": "memory bandwidth of the device; bytes/s",
    "roofline/link": "bandwidth between devices; bytes/s",
    "roofline/weight_bytes": "size of the weights; bytes",
    "epoch": "SFT: passes over the training samples so far",
    "mean_token_accuracy": "SFT: fraction of targets that are the most likely token",
    "num_targets": "SFT: target tokens; count",
}
"""Every key of metrics.jsonl, and what it means. NAME is a reward function's. A null stands for a metric that is not
known in a step."""


class Timer:
    """Seconds of the named phases of a step. On CUDA, a phase ends when the device has finished it."""

    def __init__(self, *phases: str) -> None:
        self.seconds = dict.fromkeys(phases, 0.0)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        watchdog.beat(name.removeprefix("time/"))
        start = time.perf_counter()
        yield
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.seconds[name] += time.perf_counter() - start


def memory_gb(device: torch.device) -> float:
    """Peak memory so far: the allocator's on CUDA, the process's resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def process_metrics(device: torch.device) -> dict[str, float]:
    """Peak memory, and resident memory and open files, which show leaks."""
    import psutil  # a late import, so that importing vtfast works without it

    process = psutil.Process()
    return {
        "memory_gb": memory_gb(device),
        "resident_gb": process.memory_info().rss / 1e9,
        "open_files": process.num_fds(),
    }


class UpdateSums(NamedTuple):
    """What the metrics need of an update."""

    sums: dict[str, float]
    """Over this rank's scored tokens: for GRPO `GRPOObjective.sums`, loss, scored_tokens, and the largest
    sampler_drift_max; for SFT loss, correct, entropy."""
    grad_norm: float
    learning_rate: float
    batches: StepBatches
    """As they were cut in the end."""


def grpo_metrics(
    session: Session,
    step: int,
    groups: Sequence[ScoredGroup],
    update: UpdateSums,
    reward_names: Sequence[str],
    skipped: int,
    seconds: Mapping[str, float],
    rollout_seconds: Mapping[str, float],
) -> dict[str, float | None]:
    """The metrics of a GRPO step. Collective.

    Args:
        skipped: samples of all ranks that were skipped in this step.
        seconds: of the step's phases, by metric name.
        rollout_seconds: of this rank's prefill and decode; empty if the engine does not report them."""
    completions = step_metrics(groups, update.sums, reward_names, session.ranks)
    seconds = {**seconds, **{f"rollout/{part}_seconds": value for part, value in rollout_seconds.items()}}
    flops = update_flops(session.policy, update.batches.micro_batches)
    return {
        "step": step,
        **completions,
        "frac_groups_skipped": update.batches.skipped,
        **update_metrics(session, update, skipped, seconds, completions["num_tokens"] or 0, flops),
    }


def update_metrics(
    session: Session, update: UpdateSums, skipped: int, seconds: Mapping[str, float], num_tokens: float, flops: float
) -> dict[str, float | None]:
    """The metrics that GRPO and SFT have in common.

    Args:
        skipped: samples of all ranks that were skipped in this step.
        seconds: of the step and its phases, by metric name.
        flops: of this rank's update."""
    device = session.ranks.device
    return {
        "skipped_samples": skipped,
        "passes": len(update.batches.micro_batches),
        "grad_norm": update.grad_norm,
        "learning_rate": update.learning_rate,
        **seconds,
        "tokens_per_second": num_tokens / seconds["time/step"],
        "mfu": mfu(flops, seconds["time/update"], device),
        **session.health.metrics(),
        "token_budget": session.budget.tokens,
        **process_metrics(device),
    }


def step_metrics(
    groups: Sequence[ScoredGroup], sums: Mapping[str, float], reward_names: Sequence[str], ranks: Ranks
) -> dict[str, float | None]:
    """Metrics of the completions of a step. Collective. `sums`: of this rank's update.

    A mean over tokens is None if no token was scored, because no group had a signal; a mean over completions is None
    if no sample could be used.
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
        **{key: summed[key] / scored if scored else None for key in SUMS + SPARSE_SUMS if key in summed},
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
    """The numbers beside the progress bar."""
    if metrics["reward"] is None:
        return "no sample could be used"
    rewards = [key for key in metrics if key.startswith("rewards/") and not key.endswith(("/failed", "/std"))]
    parts = [f"reward {metrics['reward']:.2f}"]
    parts += [f"{key.removeprefix('rewards/')} {metrics[key]:.2f}" for key in rewards]
    parts += [f"length {metrics['completions/mean_length']:.0f}"]
    return ", ".join([*parts, f"{metrics['tokens_per_second']:.0f} tok/s"])


def update_flops(
    policy: Policy, micro_batches: Iterable[MicroBatch], prompt_targets: int = 0, vision_cached: bool = True
) -> float:
    """FLOPs of forward and backward of one update.

    A trained part counts 3 forwards, a frozen part that gradients pass through 2 (LoRA's own weights are neglected), a
    frozen vision encoder 1, or none if it ran before, in the rollout (`vision_cached`).
    `prompt_targets`: tokens of prompts that the head sees beside the completions.
    """
    total = 2.0 * prompt_targets * policy.head.numel() * forward_multiples(policy)[1]
    for micro_batch in micro_batches:
        for part in micro_batch.parts:
            group = micro_batch.groups[part.group]
            prompt = group.prompt
            lengths = [group.lengths[i] for i in part.members]
            total += part_update_flops(policy, len(prompt.ids), lengths, prompt.patches, vision_cached)
    return total


def completion_rows(step: int, groups: Sequence[ScoredGroup], reward_names: Sequence[str], ranks: Ranks) -> list[dict]:
    """Rows of completions.jsonl, of all ranks. Collective."""
    rows = [
        {
            "step": step,
            "row": group.sample.row,
            "kind": group.sample.kind,
            "question": group.sample.question,
            "answer": group.sample.answer,
            "completion": text,
            "reward": float(group.total[g]),
            "rewards": {name: float(group.rewards[i, g]) for i, name in enumerate(reward_names)},
            "failed": group.failures[g],
            "advantage": float(group.advantage[g]),
            "length": len(group.completions[g].tokens),
            "prompt_length": len(group.prompt.ids),
            "patches": group.prompt.patches,
            "finish_reason": group.completions[g].finish_reason,
        }
        for group in groups
        for g, text in enumerate(group.texts)
    ]
    return [{**row, "rank": rank} for rank, part in enumerate(ranks.gather(rows)) for row in part]
