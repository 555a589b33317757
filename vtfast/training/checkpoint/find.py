"""Which checkpoint `--resume_from_checkpoint` means, and whether it is whole."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from vtfast.config import RunConfig
from vtfast.training.checkpoint.checksums import CHECKSUMS, SETTINGS, find_damage, unlisted
from vtfast.training.checkpoint.save import checkpoints
from vtfast.training.checkpoint.state import State, read_state
from vtfast.utils.errors import UserError
from vtfast.utils.files import expand, step_of
from vtfast.utils.suggestions import did_you_mean

log = logging.getLogger("vtfast")
LAST = "last"


@dataclass(frozen=True)
class Checkpoint:
    """A whole one."""

    folder: Path
    """…/checkpoints/step-N"""
    state: State

    @property
    def run(self) -> Path | None:
        """The run folder that it belongs to; None for a folder that has been copied out of its run."""
        run = self.folder.parent.parent
        inside = self.folder.parent.name == "checkpoints" and (run / "config.yaml").is_file()
        return run if inside else None

    def trackers(self, run: Path) -> dict[str, str]:
        """Ids at the trackers that `run` goes on under; a fork gets its own."""
        return self.state.trackers if self.run == run.resolve() else {}


def find_checkpoint(config: RunConfig) -> Checkpoint | None:
    """The checkpoint to go on from; None to start from the beginning. Reads all of its files.

    `last` is the newest whole one of `--output_dir`, and none there is no mistake: the same command line starts a run
    and goes on with it. A path names a run folder (its newest whole one), or a step, which must be whole.

    Raises UserError for a path without a whole checkpoint."""
    wanted = config.resume_from_checkpoint
    if wanted is None:
        return None
    if wanted == LAST:
        found = _newest_whole(_output_dir(config.output_dir).resolve(), config)
        if found is None:
            log.info("%s: no checkpoint to go on from; starting from the beginning", config.output_dir)
        return found
    run, step = _meaning(wanted)
    if step is None:
        found = _newest_whole(run, config)
        if found is None:
            raise UserError(f"--resume_from_checkpoint {wanted}: holds no whole checkpoint")
        return found
    if problem := find_damage(step) or _midway(step, config):
        raise UserError(f"--resume_from_checkpoint {wanted}: {problem}; name another one, or use last")
    return _read(step)


def settings_of(wanted: str, output_dir: str | None) -> Path | None:
    """The config.yaml of the checkpoint that `--resume_from_checkpoint` means; of `last` the run's, where no checkpoint
    has a sound one; None where there is no run yet.

    Looks at that file alone: whether all of the checkpoint is whole is found out later."""
    if wanted == LAST:
        run, step = _output_dir(output_dir), None
    else:
        run, step = _meaning(wanted)
    candidates = [step] if step else [folder for _, folder in checkpoints(run / "checkpoints")]
    for folder in candidates:
        problem = find_damage(folder, only=SETTINGS)
        if problem is None:
            return folder / SETTINGS
        if step:
            raise UserError(f"--resume_from_checkpoint {wanted}: {problem}; name another one, or use last")
    if wanted == LAST:  # a run that starts over is still the same run
        return run / "config.yaml" if (run / "config.yaml").is_file() else None
    raise UserError(f"--resume_from_checkpoint {wanted}: holds no checkpoint that can be resumed")


def _newest_whole(run: Path, config: RunConfig) -> Checkpoint | None:
    for _, folder in checkpoints(run / "checkpoints"):
        log.info("%s: reading all of it, to see whether it is whole", folder)
        problem = find_damage(folder) or _midway(folder, config)
        if problem is None:
            return _read(folder)
        log.warning("%s: %s; taking the one before", folder.name, problem)
    return None


def _read(folder: Path) -> Checkpoint:
    state = read_state(folder)
    if folder.name != f"step-{state.step}":
        raise UserError(f"{folder}: is of step {state.step}; give it the name step-{state.step} back")
    if strangers := unlisted(folder):
        raise UserError(f"{folder / strangers[0]}: is not listed in {CHECKSUMS}, so nothing vouches for it; remove it")
    return Checkpoint(folder, state)


def _midway(folder: Path, config: RunConfig) -> str | None:
    """A run that uses its answers several times can go on only where it asks anew."""
    step, every = step_of(folder.name), getattr(config, "num_iterations", 1)
    if step % every == 0 or step >= (config.max_steps or step):
        return None
    return f"was saved between two uses of the same answers (--num_iterations {every})"


def _meaning(wanted: str) -> tuple[Path, Path | None]:
    """-> (run folder, step folder or None for its newest)"""
    path = expand(wanted)
    if path.name == LAST and not path.exists():
        path = path.parent
    path = path.resolve()
    if not path.is_dir():
        meant = did_you_mean(wanted, "name a run folder or a checkpoint, or use last")
        raise UserError(f"--resume_from_checkpoint {wanted}: no such folder; {meant}")
    if step_of(path.name) is not None:
        return path.parent.parent, path
    return (path.parent if path.name == "checkpoints" else path), None


def _output_dir(output_dir: str | None) -> Path:
    if output_dir is None:
        raise UserError("--resume_from_checkpoint last: needs --output_dir, the run to go on with")
    return expand(output_dir)
