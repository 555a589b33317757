"""Writing a checkpoint: every rank its part, into a folder that gets its name when all of it is on the disk.

    begin     rank 0 makes `.step-N.partial`; every rank takes hold of its tensors and starts to write
    settle    the ranks tell each other how far they are; when all have written, rank 0 renames the folder

Writing goes on in a thread. With `async_save` the tensors are copies and training goes on; without it the same path is
waited for at once, and nothing is copied.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from vtfast.distributed import heartbeat
from vtfast.distributed.ranks import Ranks
from vtfast.training.checkpoint.checksums import PARTS, damage, remove, stamp, sums, write_sums
from vtfast.training.checkpoint.optimizer import fragments, to_tensors
from vtfast.training.checkpoint.rng import rng_state
from vtfast.utils.errors import SharedError, UserError
from vtfast.utils.files import flush, step_of

log = logging.getLogger("vtfast")


@dataclass(frozen=True)
class Report:
    """What a rank says of its part of a checkpoint."""

    problem: str | None
    """Why it could not be written."""
    sums: dict[str, dict[str, Any]]


class Saver:
    """The checkpoints of a run. `begin` and `settle` are collective."""

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        *,
        background: bool = False,
        keep: int | None = None,
        stop_on_error: bool = True,
    ) -> None:
        """
        Args:
            folder: the run's `checkpoints`.
            background: write while training goes on.
            keep: whole checkpoints to keep, the newest ones; None: all.
            stop_on_error: whether a checkpoint that cannot be written ends the run.
        """
        self.folder, self.ranks, self.background, self.keep = folder, ranks, background, keep
        self.stop_on_error = stop_on_error
        self.last: int | None = None
        """Newest step that has been saved."""
        self.pending: tuple[int, Future[Report]] | None = None
        self._whole: dict[tuple, bool] = {}
        """What has been found out about checkpoints, by their `stamp`."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def go_on(self, folder: Path, step: int) -> None:
        """From a checkpoint that has just been read and found whole."""
        self.last = step
        if self.ranks.is_main:
            self._whole[stamp(folder)] = True

    def begin(self, step: int, module: nn.Module, zero: Any, write_rest: Callable[[Path, Any], None]) -> None:
        """Start to write step N, or write it.

        Args:
            module: the policy's Hugging Face model. `zero`: `engine.optimizer` of DeepSpeed.
            write_rest: called on rank 0 with the folder and the model's state dict, to write all that is not a
                rank's own.
        """
        self.settle(wait=True)
        partial = self.folder / f".step-{step}.partial"
        problem = _attempt(lambda: _make(partial)) if self.ranks.is_main else None
        if problem := self.ranks.from_main(problem):
            self._failed(step, problem)
            return
        tensors, places = to_tensors(list(fragments(module, zero)))
        weights = model_weights(module) if self.ranks.is_main else {}
        if self.background:
            tensors, weights = copies(tensors), copies(weights)
        rank, is_main = self.ranks.rank, self.ranks.is_main
        own = partial / "resume" / f"rank-{rank}.safetensors"
        tensors |= rng_state()

        def write() -> Report:
            written: dict[str, dict[str, Any]] = {}

            def parts() -> None:
                own.parent.mkdir(parents=True, exist_ok=True)  # a network disk may show it late
                save_file(tensors, own, metadata=places)
                files = [own]
                if is_main:
                    write_rest(partial, weights)
                    others = (p for p in partial.rglob("*") if p.is_file())
                    files += [p for p in others if not p.match(PARTS)]
                for path in files:
                    flush(path)
                written.update(sums(partial, files))

            return Report(_attempt(parts), written)

        self.pending = step, self._thread.submit(write)
        if not self.background:
            self.settle(wait=True)

    def settle(self, wait: bool = False) -> None:
        """Name the checkpoint that is being written, if all ranks are done with it. `wait` until they are."""
        if self.pending is None:
            return
        step, future = self.pending
        reports = self.ranks.gather(future.result() if wait or future.done() else None)
        if None in reports:
            return
        self.pending = None
        problems = [
            f"{report.problem} (rank {rank})" if self.ranks.size > 1 else report.problem
            for rank, report in enumerate(reports)
            if report.problem
        ]
        problem = problems[0] if problems else None
        if self.ranks.is_main:
            partial = self.folder / f".step-{step}.partial"
            problem = problem or _attempt(lambda: self._name(partial, step, reports))
            if problem:
                shutil.rmtree(partial, ignore_errors=True)  # the disk may be gone altogether
        if problem := self.ranks.from_main(problem):
            self._failed(step, problem)
            return
        self.last = step
        if self.ranks.is_main and (problem := _attempt(self._drop_old)):
            log.warning("checkpoints: old ones cannot be removed (%s)", problem)

    def finish(self, error: BaseException) -> None:
        """What is being written, before `error` ends the run: name it, or say that it is lost. Raises nothing of its
        own, since `error` is what there is to read."""
        if self.pending is None:
            return
        name = self.folder / f"step-{self.pending[0]}"
        if self.ranks.size > 1 and not isinstance(error, SharedError):
            log.error("%s: was being written, and is lost; %s", name, self.kept)
            return
        try:
            self.settle(wait=True)
        except UserError as full:
            log.error("%s", full)
        except Exception:
            log.exception("%s: could not be written; %s", name, self.kept)

    def _name(self, partial: Path, step: int, reports: list[Report]) -> None:
        write_sums(partial, (report.sums for report in reports))
        for folder in (partial, *(path for path in partial.rglob("*") if path.is_dir())):
            flush(folder)
        folder = partial.rename(self.folder / f"step-{step}")
        flush(self.folder)
        self._whole[stamp(folder)] = True

    @heartbeat.patient("saving")
    def _drop_old(self) -> None:
        """What is older than the newest `keep` whole ones. A damaged one takes no place among them."""
        if self.keep is None:
            return
        kept = 0
        for _, folder in checkpoints(self.folder):
            if kept < self.keep:
                kept += self._is_whole(folder)
            else:
                remove(folder)

    def _is_whole(self, folder: Path) -> bool:
        """Read again only if somebody has written to it since."""
        seen = stamp(folder)
        if seen not in self._whole:
            problem = damage(folder)
            self._whole[seen] = problem is None
            if problem:
                log.warning("%s: %s; it does not count for --save_total_limit", folder, problem)
        return self._whole[seen]

    def insist(self, step: int) -> None:
        """Raises UserError if the run's last step is not on the disk: a run that could go on without a checkpoint
        cannot end without one."""
        if step and step != self.last:
            raise SharedError(
                f"{self.folder / f'step-{step}'}: the trained weights could not be saved; {self.kept}. Make room and go"
                " on with --resume_from_checkpoint last"
            )

    @property
    def kept(self) -> str:
        """What there is to go on from, in words."""
        kept = "none has been written yet" if self.last is None else f"step-{self.last} is intact"
        return f"the last checkpoint: {kept}"

    def _failed(self, step: int, problem: str) -> None:
        text = f"{self.folder / f'step-{step}'}: cannot be written: {problem}; {self.kept}"
        if self.stop_on_error:
            raise SharedError(
                f"{text}. Make room and go on with --resume_from_checkpoint last"
                " (--on_save_error continue would have gone on without it)"
            )
        if self.ranks.is_main:
            log.warning("%s; the run goes on (--on_save_error continue)", text)


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of a run's checkpoints, newest first; whole or not."""
    if not folder.is_dir():
        return []
    found = [(step_of(path.name), path) for path in folder.iterdir() if path.is_dir()]
    return sorted(((step, path) for step, path in found if step is not None), reverse=True)


def model_weights(module: nn.Module) -> dict[str, Tensor]:
    """What `save_pretrained` writes: the state dict, or of a model with LoRA that of the adapters."""
    weights = module.state_dict()
    if getattr(module, "_hf_peft_config_loaded", False):
        return {name: value for name, value in weights.items() if "lora_" in name}
    return weights


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In CPU memory. Names that stand for one tensor (tied weights) stand for one copy."""
    made: dict[tuple[int, tuple[int, ...]], Tensor] = {}
    result = {}
    for name, value in tensors.items():
        key = value.data_ptr(), tuple(value.shape)
        if key not in made:
            made[key] = value.detach().to("cpu", copy=True)
        result[name] = made[key]
    return result


def _make(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "resume").mkdir(parents=True)


def _attempt(action: Callable[[], object]) -> str | None:
    """What the disk has against it, in words; None if it was done."""
    try:
        action()
    except (OSError, SafetensorError) as error:
        return str(error).strip() or type(error).__name__
    return None
