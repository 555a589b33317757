"""Optimizer steps that are skipped, and warnings for metrics that leave their bounds.

A step is skipped if a loss or the gradient norm is not finite on any rank, or if none of its samples can be used.
Weights, optimizer state and schedule stay as they are, so the steps after it are not changed by it. `nonfinite.jsonl`
lists what is needed to find the cause.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vtfast.config import Config
from vtfast.distributed.ranks import Ranks
from vtfast.training.gradients import drop_gradients, global_norm, nonfinite_gradients, optimizer_steps
from vtfast.training.groups import MicroBatch
from vtfast.utils.errors import SharedError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

log = logging.getLogger("vtfast")

FILE = "nonfinite.jsonl"


@dataclass
class Health:
    """Counters of a run, equal on all ranks, and kept in checkpoints."""

    nonfinite_steps: int = 0
    """Steps skipped because a loss or gradient was not finite."""
    empty_steps: int = 0
    """Steps skipped because none of their samples could be used."""
    left_out_in_a_row: int = 0
    """Consecutive skipped steps."""
    alarms: list[str] = field(default_factory=list)
    """Metrics that are out of their bounds and have been warned about."""

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(vars(Health(**state)))  # TypeError for another version's keys

    def metrics(self) -> dict[str, int]:
        return {
            "nonfinite_steps": self.nonfinite_steps,
            "empty_steps": self.empty_steps,
            "step_left_out": int(self.left_out_in_a_row > 0),
        }

    def entered(self, name: str, is_out: bool) -> bool:
        """Whether `name` leaves its bounds in this step and was inside before."""
        if is_out == (name in self.alarms):
            return False
        if is_out:
            self.alarms.append(name)
        else:
            self.alarms.remove(name)
        return is_out


def warn_out_of_bounds(health: Health, step: int, metrics: Mapping[str, float | None], config: Config) -> None:
    """Log a warning when a metric of a GRPO step leaves its bounds; not again until it has returned."""
    bounds = {
        "kl": (config.kl_warning, "the policy is {:.3g} nats a token from the reference model"),
        "entropy": (
            config.entropy_warning,
            "the entropy of a token is {:.3g} nats: the completions of a prompt are nearly identical",
        ),
        "sampler_drift": (
            config.sampler_drift_warning,
            "sampled and trained log-probs differ by {:.3g} on average, {sampler_drift_max:.3g} at most",
        ),
    }
    for name, (bound, text) in bounds.items():
        value = metrics[name]
        if value is None or math.isnan(value):
            continue  # not known in this step
        is_out = value < bound if name == "entropy" else value > bound
        if health.entered(name, is_out):
            log.warning("step %d: %s (--%s_warning %g)", step, text.format(value, **metrics), name, bound)


class GuardedOptimizer:
    """Runs the optimizer step, or skips it."""

    def __init__(self, engine: DeepSpeedEngine, ranks: Ranks, folder: Path, most_in_a_row: int, health: Health) -> None:
        """`folder`: of the run. `most_in_a_row`: skipped steps; the last of them raises SharedError."""
        self.engine, self.ranks, self.file = engine, ranks, folder / FILE
        self.most_in_a_row = most_in_a_row
        self.health = health
        self.steps_done = optimizer_steps(engine)

    def step(self, step: int, micro_batches: Sequence[MicroBatch], losses: Tensor) -> float:
        """The gradient norm over all ranks; nan if the step was skipped. Collective.

        `losses`: [number of micro-batches] of this rank.
        """
        norm = global_norm(self.engine)
        is_finite = math.isfinite(norm) and bool(losses.isfinite().all())
        if all(self.ranks.gather(is_finite)):
            self.engine.step()
            self.steps_done += 1
            self.health.left_out_in_a_row = 0
            return float(self.engine.get_global_grad_norm())
        self.health.nonfinite_steps += 1
        gradients = nonfinite_gradients(self.engine)
        drop_gradients(self.engine)
        self._skip(
            step, "nonfinite", "a loss or gradient was not finite", self._describe(micro_batches, losses), gradients
        )
        return float("nan")

    def undo_failed(self, step: int) -> None:
        """Reset the engine to the state before the first micro-batch, after a pass or `step` ran out of memory. Raises
        SharedError if weights have changed already."""
        if optimizer_steps(self.engine) != self.steps_done:
            raise SharedError(
                f"step {step}: out of memory while the optimizer changed the weights, which cannot be undone; resume"
                " with --resume_from_checkpoint last --rollout_keep_cache false"
            )
        drop_gradients(self.engine)

    def skip_empty(self, step: int) -> None:
        """Skip a step that has no sample to train on. Collective."""
        self.health.empty_steps += 1
        self._skip(step, "empty", "none of its samples could be used, see skipped.jsonl")

    def _skip(
        self, step: int, kind: str, reason: str, passes: Sequence[dict] = (), gradients: Sequence[str] = ()
    ) -> None:
        everyone = self.ranks.gather((passes, gradients))
        if self.ranks.is_main:
            weights = self.engine.module.module.named_parameters()
            line = {
                "step": step,
                "kind": kind,
                "passes": [one for passes, _ in everyone for one in passes],
                "gradients": sorted({name for _, names in everyone for name in names}),
                "weights": [name for name, value in weights if not bool(value.isfinite().all())],
            }
            with self.file.open("a") as file:
                file.write(json.dumps(line) + "\n")
        self.health.left_out_in_a_row += 1
        row = self.health.left_out_in_a_row
        log.warning("step %d: skipped, %s (%d in a row; %s)", step, reason, row, self.file)
        if row >= self.most_in_a_row:
            raise SharedError(
                f"step {step}: skipped, {reason}; {row} steps in a row (--max_nonfinite_steps {self.most_in_a_row})."
                f" {self.file} lists their rows and tensors. The skipped steps changed no weights"
            )

    def _describe(self, micro_batches: Sequence[MicroBatch], losses: Tensor) -> list[dict]:
        """The samples and the loss of each of this rank's micro-batches."""
        return [
            {
                "rank": self.ranks.rank,
                "pass": number,
                "rows": [group.sample.row for group in groups],
                "prompts": [group.prompt.key for group in groups],
                "loss": loss if math.isfinite(loss) else str(loss),
            }
            for number, (micro_batch, loss) in enumerate(zip(micro_batches, losses.tolist(), strict=True), 1)
            for groups in [[micro_batch.groups[part.group] for part in micro_batch.parts]]
        ]
