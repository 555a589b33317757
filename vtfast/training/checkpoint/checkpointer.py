"""What a run's checkpoints hold, in one place; `save.Saver` writes them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from vtfast.config import RunConfig
from vtfast.data.processor import Processor
from vtfast.distributed import watchdog
from vtfast.distributed.ranks import Ranks
from vtfast.evaluate.held_out import HeldOutScores
from vtfast.model.policy import Policy
from vtfast.report.tracking import Tracker
from vtfast.training.checkpoint.checksums import SETTINGS, STATE
from vtfast.training.checkpoint.logs import flush_lists
from vtfast.training.checkpoint.optimizer import scalars
from vtfast.training.checkpoint.resume import Identity
from vtfast.training.checkpoint.run_folder import settings
from vtfast.training.checkpoint.save import Saver
from vtfast.training.checkpoint.state import FORMAT, Counters, State, code_versions
from vtfast.training.health import Health

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class Checkpointer(Saver):
    """The saver of a run's checkpoints, which knows what one holds."""

    def __init__(
        self,
        run: Path,
        config: RunConfig,
        ranks: Ranks,
        policy: Policy,
        processor: Processor,
        engine: DeepSpeedEngine,
        identity: Identity,
        health: Health,
    ) -> None:
        """`run`: the run folder."""
        super().__init__(
            run / "checkpoints",
            ranks,
            background=config.async_save,
            keep=config.save_total_limit,
            stop_on_error=config.on_save_error == "stop",
        )
        self.run, self.config, self.policy, self.processor = run, config, policy, processor
        self.engine, self.identity, self.health = engine, identity, health

    @watchdog.no_progress_expected("saving")
    def save(self, step: int, before: HeldOutScores | None, tracker: Tracker | None) -> None:
        """Write a checkpoint of the run after `step` steps; with `async_save`, start to write it. Collective.

        Args:
            before: held-out result from before training.
            tracker: rank 0's; None on the others."""
        state = self._state(step, before, tracker.ids if tracker else {})

        def write_shared(folder: Path, weights: dict[str, Tensor]) -> None:
            if tracker:
                tracker.flush()  # a checkpoint must not be ahead of the logs
            flush_lists(self.run)
            self.policy.module.save_pretrained(folder, state_dict=weights)
            self.processor.save_pretrained(folder)
            (folder / SETTINGS).write_text(settings(self.config), encoding="utf-8")
            (folder / STATE).write_text(state.to_json(), encoding="utf-8")

        self.start(step, self.policy.module, self.engine.optimizer, write_shared)

    def _state(self, step: int, before: HeldOutScores | None, trackers: dict[str, str]) -> State:
        """The run after `step` steps, without its tensors."""
        engine, identity = self.engine, self.identity
        return State(
            step=step,
            method=identity.method,
            ranks=self.ranks.size,
            prompts_per_step=identity.prompts_per_step,
            samples=identity.num_samples,
            samples_digest=identity.samples_digest,
            base=identity.base_fingerprint,
            schedule=engine.lr_scheduler.state_dict(),
            optimizer=scalars(engine.optimizer),
            counters=Counters(
                global_steps=int(engine.global_steps),
                global_samples=int(engine.global_samples),
                micro_steps=int(engine.micro_steps),
                skipped_steps=int(engine.skipped_steps),
            ),
            before=before,
            trackers=trackers,
            carried={"health": self.health.state_dict()},
            code=code_versions(),
            format=FORMAT,
        )
