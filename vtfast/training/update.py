"""The update of an optimizer step: forward and backward of every micro-batch, then the optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from vtfast.distributed import watchdog
from vtfast.distributed.ranks import Ranks
from vtfast.training.health import GuardedOptimizer
from vtfast.training.load_balancing import StepBatches
from vtfast.training.token_budget import TokenBudget

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class UpdateResult(NamedTuple):
    """What came out of an update."""

    outputs: list[Tensor]
    """What the objective returned, its loss first: each stacked over this rank's micro-batches."""
    grad_norm: float
    """Over all ranks; nan if the step was skipped."""
    learning_rate: float
    """The learning rate of this step."""
    batches: StepBatches
    """As they were cut in the end, if memory was short."""


class Updater:
    """Runs updates with a DeepSpeed engine. A step whose loss or gradient is not finite changes no weight."""

    def __init__(self, engine: DeepSpeedEngine, ranks: Ranks, budget: TokenBudget, optimizer: GuardedOptimizer) -> None:
        self.engine, self.ranks, self.budget, self.optimizer = engine, ranks, budget, optimizer

    def update(self, step: int, batches: StepBatches, *loss_denominators: int) -> UpdateResult:
        """One optimizer step. Collective.

        `loss_denominators`: what the objective gets beside a micro-batch."""
        learning_rate = self.engine.get_lr()[0]
        self.engine.train()  # gradient checkpointing needs training mode; the models have no dropout

        def attempt(batches: StepBatches) -> tuple[list[Tensor], float]:
            results = self.accumulate(step, batches, loss_denominators)
            outputs = [torch.stack(values) for values in zip(*results, strict=True)]
            with self.budget.oom_is_fatal(batches.micro_batches, step, "the optimizer step"):
                return outputs, self.optimizer.step(step, batches.micro_batches, losses=outputs[0])

        (outputs, grad_norm), batches = self.budget.fit(
            batches, step, attempt, undo=lambda: self.optimizer.undo_failed(step)
        )
        self.engine.eval()
        return UpdateResult(outputs, grad_norm, learning_rate, batches)

    def accumulate(self, step: int, batches: StepBatches, loss_denominators: Sequence[int]) -> list[tuple[Tensor, ...]]:
        """Forward and backward of every micro-batch; what the objective returned for each, the loss detached."""
        results = []
        last = batches.micro_batches[-1]
        for micro_batch in batches.micro_batches:
            watchdog.beat()
            self.engine.set_gradient_accumulation_boundary(micro_batch is last)
            with self.budget.agree_on_oom():
                loss, *rest = self.engine(micro_batch, *loss_denominators)
            with self.budget.oom_is_fatal([micro_batch], step, f"the backward pass of {micro_batch.tokens} tokens"):
                # ZeRO averages gradients over the ranks. The loss is divided by the global count already, so its
                # gradients must be summed.
                self.engine.backward(loss * self.ranks.size, scale_wrt_gas=False)
            results.append((loss.detach(), *rest))
        return results

    def skip_empty(self, step: int) -> float:
        """A step in which no sample could be used: nothing changes; the learning rate. Collective."""
        self.optimizer.skip_empty(step)
        return self.engine.get_lr()[0]
