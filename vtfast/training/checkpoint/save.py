"""Writing a checkpoint: every rank writes its part into a folder that gets its name once all of it is on the disk.

    start   rank 0 makes `.step-N.partial`; every rank collects its tensors and starts to write
    poll    the ranks exchange their results; when all have written, rank 0 renames the folder

A thread does the writing. With `async_save` it writes copies of the tensors and training continues; without it the same
code runs, nothing is copied, and `start` waits for the thread.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from vtfast.distributed import watchdog
from vtfast.distributed.ranks import Ranks
from vtfast.training.checkpoint.checksums import (
    RANK_FILES,
    Checksums,
    FileStats,
    checksums_of,
    file_stats,
    find_damage,
    remove,
    write_checksums,
)
from vtfast.training.checkpoint.optimizer import fragments, to_tensors
from vtfast.training.checkpoint.rng import rng_state
from vtfast.utils.errors import SharedError, UserError
from vtfast.utils.files import flush, step_of

log = logging.getLogger("vtfast")
T = TypeVar("T")


class Saver:
    """Writes, names and deletes the checkpoints of a run. `start` and `poll` are collective."""

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
            folder: RUN/checkpoints.
            background: write while training continues.
            keep: number of whole checkpoints to keep, the newest ones; None keeps all.
            stop_on_error: whether a checkpoint that cannot be written ends the run.
        """
        self.folder, self.ranks, self.background, self.keep = folder, ranks, background, keep
        self.stop_on_error = stop_on_error
        self.last: int | None = None
        """Newest step that has been saved."""
        self.pending: tuple[int, Future[tuple[Checksums | None, str | None]]] | None = None
        """The step that is being written, and what `_attempt` returns for this rank's part."""
        self._is_whole: dict[FileStats, bool] = {}
        """Checkpoints that have been checked. Checking one reads all of its gigabytes, so it is done once, and again
        only if its files have changed."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def mark_resumed(self, folder: Path, step: int) -> None:
        """Count a checkpoint that has just been read and found whole as saved."""
        self.last = step
        if self.ranks.is_main:
            self._is_whole[file_stats(folder)] = True

    def start(self, step: int, module: nn.Module, zero: Any, write_shared: Callable[[Path, Any], None]) -> None:
        """Start to write the checkpoint of `step`; unless `background` is set, also finish it.

        Args:
            module: the policy's Hugging Face model.
            zero: `engine.optimizer` of DeepSpeed.
            write_shared: called on rank 0 with the folder and the model's state dict; writes all files that are not
                one rank's own.
        """
        self.poll(wait=True)
        partial = self.folder / f".step-{step}.partial"
        problem = _attempt(lambda: _make_folder(partial))[1] if self.ranks.is_main else None
        if problem := self.ranks.from_main(problem):
            self._fail(step, problem)
            return
        tensors, places = to_tensors(list(fragments(module, zero)))
        weights = model_weights(module) if self.ranks.is_main else {}
        if self.background:
            tensors, weights = copies(tensors), copies(weights)
        rank, is_main = self.ranks.rank, self.ranks.is_main
        rank_file = partial / "resume" / f"rank-{rank}.safetensors"
        tensors |= rng_state()

        def write() -> Checksums:
            rank_file.parent.mkdir(parents=True, exist_ok=True)  # a network disk may show it late
            save_file(tensors, rank_file, metadata=places)
            files = [rank_file]
            if is_main:
                write_shared(partial, weights)
                shared = (path for path in partial.rglob("*") if path.is_file())
                files += [path for path in shared if not path.match(RANK_FILES)]
            for path in files:
                flush(path)
            return checksums_of(partial, files)

        self.pending = step, self._thread.submit(_attempt, write)
        if not self.background:
            self.poll(wait=True)

    def poll(self, wait: bool = False) -> None:
        """Name the checkpoint that is being written if all ranks have written it. `wait`: until they have."""
        if self.pending is None:
            return
        step, future = self.pending
        gathered = self.ranks.gather(future.result() if wait or future.done() else None)
        parts = [part for part in gathered if part is not None]
        if len(parts) < len(gathered):
            return
        self.pending = None
        problem = next((f"{problem} (rank {rank})" for rank, (_, problem) in enumerate(parts) if problem), None)
        if self.ranks.is_main:
            partial = self.folder / f".step-{step}.partial"
            checksums = [part for part, _ in parts if part is not None]
            problem = problem or _attempt(lambda: self._name(partial, step, checksums))[1]
            if problem:
                shutil.rmtree(partial, ignore_errors=True)  # the disk may be gone altogether
        if problem := self.ranks.from_main(problem):
            self._fail(step, problem)
            return
        self.last = step
        if self.ranks.is_main and (problem := _attempt(self._delete_old)[1]):
            log.warning("checkpoints: old ones cannot be removed (%s)", problem)

    def finish(self, error: BaseException) -> None:
        """Name the checkpoint that is being written before `error` ends the run, or log that it is lost. Raises
        nothing, so that `error` is what the user reads."""
        if self.pending is None:
            return
        if self.ranks.size > 1 and not isinstance(error, SharedError):
            name = self.folder / f"step-{self.pending[0]}"
            log.error("%s: was being written, and is lost; %s", name, self.last_saved)
            return
        try:
            self.poll(wait=True)
        except Exception as second:
            log.error("the checkpoint is lost, too: %s", second, exc_info=not isinstance(second, UserError))

    def require_saved(self, step: int) -> None:
        """Raises UserError if the run's last step is not on the disk. A run may continue without a checkpoint
        (`--on_save_error continue`), but not end without its weights."""
        if step and step != self.last:
            raise SharedError(
                f"{self.folder / f'step-{step}'}: the trained weights could not be saved; {self.last_saved}. Make room"
                " and resume with --resume_from_checkpoint last"
            )

    @property
    def last_saved(self) -> str:
        """The checkpoint to resume from, for messages."""
        last = "none has been written yet" if self.last is None else f"step-{self.last} is intact"
        return f"the last checkpoint: {last}"

    def _name(self, partial: Path, step: int, checksums: Sequence[Checksums]) -> None:
        write_checksums(partial, checksums)
        for folder in (partial, *(path for path in partial.rglob("*") if path.is_dir())):
            flush(folder)
        folder = partial.rename(self.folder / f"step-{step}")
        flush(self.folder)
        self._is_whole[file_stats(folder)] = True

    @watchdog.no_progress_expected("saving")
    def _delete_old(self) -> None:
        """Delete what is older than the newest `keep` whole checkpoints. A damaged one does not count."""
        if self.keep is None:
            return
        kept = 0
        for folder in checkpoints(self.folder):
            if kept < self.keep:
                kept += self._check(folder)
            else:
                remove(folder)

    def _check(self, folder: Path) -> bool:
        """Whether a checkpoint is whole."""
        stats = file_stats(folder)
        if stats not in self._is_whole:
            problem = find_damage(folder)
            self._is_whole[stats] = problem is None
            if problem:
                log.warning("%s: %s; it does not count for --save_total_limit", folder, problem)
        return self._is_whole[stats]

    def _fail(self, step: int, problem: str) -> None:
        text = f"{self.folder / f'step-{step}'}: cannot be written: {problem}; {self.last_saved}"
        if self.stop_on_error:
            raise SharedError(
                f"{text}. Make room and resume with --resume_from_checkpoint last"
                " (with --on_save_error continue the run would have continued without this checkpoint)"
            )
        if self.ranks.is_main:
            log.warning("%s; the run continues (--on_save_error continue)", text)


def checkpoints(folder: Path) -> list[Path]:
    """The folders `step-N` of a folder, newest first, damaged checkpoints included."""
    if not folder.is_dir():
        return []
    # not glob, which takes a folder that it cannot read for an empty one
    steps = {path: step_of(path.name) for path in folder.iterdir() if path.is_dir()}
    return sorted((path for path in steps if steps[path] is not None), key=lambda path: -(steps[path] or 0))


def model_weights(module: nn.Module) -> dict[str, Tensor]:
    """The tensors that `save_pretrained` writes: the state dict, or with LoRA that of the adapters."""
    weights = module.state_dict()
    if getattr(module, "_hf_peft_config_loaded", False):
        return {name: value for name, value in weights.items() if "lora_" in name}
    return weights


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in CPU memory. Names that share one tensor (tied weights) share one copy."""
    copied: dict[tuple[int, tuple[int, ...]], Tensor] = {}
    result = {}
    for name, value in tensors.items():
        key = value.data_ptr(), tuple(value.shape)
        if key not in copied:
            copied[key] = value.detach().to("cpu", copy=True)
        result[name] = copied[key]
    return result


def _make_folder(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "resume").mkdir(parents=True)


def _attempt(work: Callable[[], T]) -> tuple[T | None, str | None]:
    """(what `work` returns, None), or (None, the disk's error message). Other errors propagate."""
    try:
        return work(), None
    except (OSError, SafetensorError) as error:
        return None, str(error) or type(error).__name__
