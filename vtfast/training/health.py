"""Is the run well? Steps that have to be left out, and figures that leave their bounds.

A step is left out when a loss or the gradient's norm is not finite, on whatever rank, or when none of its questions can
be used. No weight, no optimizer state and no schedule moves then, so that the steps after it are what they would have
been. `nonfinite.jsonl` keeps what is needed to look into it.
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
from vtfast.training.gradients import drop_gradients, global_norm, nonfinite_gradients
from vtfast.training.groups import MicroBatch
from vtfast.utils.errors import SharedError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

log = logging.getLogger("vtfast")

FILE = "nonfinite.jsonl"


@dataclass
class Health:
    """What a run remembers of itself; the same on all ranks, and carried by checkpoints."""

    nonfinite_steps: int = 0
    """Steps left out since a loss or gradient was not finite."""
    empty_steps: int = 0
    """Steps left out since none of their questions could be used."""
    left_out_in_a_row: int = 0
    """Of either kind, up to now."""
    alarms: list[str] = field(default_factory=list)
    """Figures that are out of their bounds and have been warned of."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Health:
        return cls(**{**state, "alarms": list(state["alarms"])})

    def metrics(self) -> dict[str, int]:
        return {
            "nonfinite_steps": self.nonfinite_steps,
            "empty_steps": self.empty_steps,
            "step_left_out": int(self.left_out_in_a_row > 0),
        }

    def begins(self, name: str, is_out: bool) -> bool:
        """Whether `name` leaves its bounds with this step, and was inside before."""
        if is_out == (name in self.alarms):
            return False
        if is_out:
            self.alarms.append(name)
        else:
            self.alarms.remove(name)
        return is_out


def warn(health: Health, step: int, metrics: Mapping[str, float | None], config: Config) -> None:
    """One warning for each time that a figure of a GRPO step leaves its bounds, and not one a step."""
    figures = {
        "kl": (config.kl_warning, "the policy is {:.3g} nats a token from the reference model"),
        "entropy": (
            config.entropy_warning,
            "the entropy of a token is down to {:.3g} nats: answers are nearly all alike",
        ),
        "sampler_drift": (
            config.sampler_drift_warning,
            "sampled and trained log-probs differ by {:.3g} on average, {sampler_drift_max:.3g} at most",
        ),
    }
    for name, (bound, text) in figures.items():
        value = metrics[name]
        if value is None or math.isnan(value):
            continue  # of a step that says nothing about it
        is_out = value < bound if name == "entropy" else value > bound
        if health.begins(name, is_out):
            log.warning("step %d: %s (--%s_warning %g)", step, text.format(value, **metrics), name, bound)


class GuardedOptimizer:
    """Lets optimizer steps happen, or leaves them out."""

    def __init__(
        self, engine: DeepSpeedEngine, ranks: Ranks, folder: Path, most_in_a_row: int, health: Health | None = None
    ) -> None:
        """`folder`: the run's. `most_in_a_row`: of steps left out; the last one raises UserError. `health`: of a
        run that goes on."""
        self.engine, self.ranks, self.file = engine, ranks, folder / FILE
        self.most_in_a_row = most_in_a_row
        self.health = health or Health()

    def step(self, step: int, batches: Sequence[MicroBatch], losses: Tensor) -> float:
        """The optimizer step behind all passes -> gradient norm, nan where it was left out. Collective.

        `losses`: one a pass of this rank, in the order of `batches`.
        """
        norm = global_norm(self.engine)
        is_finite = math.isfinite(norm) and bool(losses.isfinite().all())
        if all(self.ranks.gather(is_finite)):
            self.engine.step()
            self.health.left_out_in_a_row = 0
            return float(self.engine.get_global_grad_norm())
        self.health.nonfinite_steps += 1
        gradients, passes = nonfinite_gradients(self.engine), self._passes(batches, losses)
        drop_gradients(self.engine)
        self._leave_out(step, "nonfinite", "a loss or gradient was not finite", passes, gradients)
        return float("nan")

    def empty(self, step: int) -> None:
        """Of a step without any question to train on. Collective."""
        self.health.empty_steps += 1
        self._leave_out(step, "empty", "none of its questions could be used, see skipped.jsonl")

    def _leave_out(
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
        log.warning("step %d: left out, %s (%d in a row; %s)", step, reason, row, self.file)
        if row >= self.most_in_a_row:
            raise SharedError(
                f"step {step}: left out, {reason}; that makes {row} in a row (--max_nonfinite_steps"
                f" {self.most_in_a_row}). {self.file} names their rows and tensors; checkpoints hold the weights from"
                " before"
            )

    def _passes(self, batches: Sequence[MicroBatch], losses: Tensor) -> list[dict]:
        """What this rank's passes were made of."""
        return [
            {
                "rank": self.ranks.rank,
                "pass": number,
                "rows": [group.question.sample.row for group in groups],
                "prompts": [group.question.prompt.key for group in groups],
                "loss": loss if math.isfinite(loss) else str(loss),
            }
            for number, (batch, loss) in enumerate(zip(batches, losses.tolist(), strict=True), 1)
            for groups in [[batch.groups[part.group] for part in batch.parts]]
        ]
