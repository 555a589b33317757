"""What a run's checkpoints hold, in one place; `save.Saver` writes them."""

from __future__ import annotations

from collections.abc import Mapping
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
from vtfast.training.checkpoint.find import Checkpoint
from vtfast.training.checkpoint.logs import flush_lists
from vtfast.training.checkpoint.resume import Identity, Stateful, snapshot, write_files
from vtfast.training.checkpoint.save import Saver

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class Checkpointer:
    """The checkpoints of a run: `save` collects what one holds, `saver` writes it."""

    def __init__(
        self,
        folder: Path,
        *,
        config: RunConfig,
        policy: Policy,
        processor: Processor,
        engine: DeepSpeedEngine,
        ranks: Ranks,
        identity: Identity,
        parts: Mapping[str, Stateful],
        resumed: Checkpoint | None = None,
    ) -> None:
        """
        Args:
            folder: the run's.
            parts: the stateful parts of the run, by their name in the checkpoint.
            resumed: the checkpoint that has been restored.
        """
        self.folder, self.config, self.policy, self.processor = folder, config, policy, processor
        self.engine, self.ranks, self.identity, self.parts = engine, ranks, identity, parts
        self.saver = Saver(
            folder / "checkpoints",
            ranks,
            background=config.async_save,
            keep=config.save_total_limit,
            stop_on_error=config.on_save_error == "stop",
        )
        if resumed:
            self.saver.mark_resumed(resumed.folder, resumed.state.step)

    @watchdog.no_progress_expected("saving")
    def save(self, step: int, before: HeldOutScores | None, tracker: Tracker | None) -> None:
        """Write a checkpoint of the run after `step` steps; with `async_save`, start to write it. Collective.

        Args:
            before: held-out result from before training.
            tracker: rank 0's; None on the others."""
        state = snapshot(
            step,
            engine=self.engine,
            ranks=self.ranks,
            identity=self.identity,
            before=before,
            trackers=tracker.ids if tracker else {},
            parts=self.parts,
        )

        def write_shared(folder: Path, weights: dict[str, Tensor]) -> None:
            if tracker:
                tracker.flush()  # a checkpoint must not be ahead of the logs
            flush_lists(self.folder)
            write_files(folder, weights, policy=self.policy, processor=self.processor, config=self.config, state=state)

        self.saver.start(step, self.policy.module, self.engine.optimizer, write_shared)
