"""Finds the checkpoint that `--resume_from_checkpoint` names and checks that it is whole."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vtfast.config import RunConfig
from vtfast.training.checkpoint.checksums import CHECKSUMS, SETTINGS, find_damage, unlisted
from vtfast.training.checkpoint.save import checkpoints
from vtfast.training.checkpoint.state import State, read_state
from vtfast.utils.did_you_mean import did_you_mean
from vtfast.utils.errors import UserError
from vtfast.utils.files import expand, step_of

log = logging.getLogger("vtfast")
LAST = "last"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been checked and is whole."""

    folder: Path
    """…/checkpoints/step-N"""
    state: State

    @property
    def run(self) -> Path | None:
        """The run folder that it lies in; None for a folder that has been copied out of its run."""
        run = self.folder.parent.parent
        inside = self.folder.parent.name == "checkpoints" and (run / "config.yaml").is_file()
        return run if inside else None

    def trackers(self, run: Path) -> dict[str, str]:
        """Tracker ids that `run` continues with: the saved ones, or none if it is a fork of another run."""
        return self.state.trackers if self.run == run.resolve() else {}


def find_checkpoint(config: RunConfig) -> Checkpoint | None:
    """The checkpoint to resume from; None to start from the beginning. Reads all of its files.

    `last` is the newest whole checkpoint of `--output_dir`. If there is none the run starts from the beginning, so that
    one command line both starts a run and resumes it. A path names a run folder (its newest whole checkpoint is used)
    or one step, which must be whole.

    Raises UserError for a path without a whole checkpoint."""
    name = config.resume_from_checkpoint
    if name is None:
        return None

    def problem_of(folder: Path) -> str | None:
        log.info("%s: reading all files to check that they are undamaged", folder)
        return find_damage(folder) or _inside_batch(folder, config)

    folder = _newest_without_problem(*_parse(name, config.output_dir), name, problem_of)
    if folder is None:
        log.info("%s: no checkpoint to resume from; starting from the beginning", config.output_dir)
        return None
    return _read(folder)


def settings_of(name: str, output_dir: str | None) -> Path | None:
    """The config.yaml of the checkpoint that `--resume_from_checkpoint` names. For `last`, the run's own if no
    checkpoint has an undamaged one, and None if there is no run yet.

    Checks that file alone; `find_checkpoint` checks the rest."""
    run, named = _parse(name, output_dir)
    folder = _newest_without_problem(run, named, name, lambda folder: find_damage(folder, only=SETTINGS))
    if folder:
        return folder / SETTINGS
    # A run that starts from the beginning keeps its settings.
    return run / "config.yaml" if (run / "config.yaml").is_file() else None


def _newest_without_problem(
    run: Path, named: Path | None, name: str, problem_of: Callable[[Path], str | None]
) -> Path | None:
    """The checkpoint `named`, or the newest of `run` that has no problem; None if `last` finds none."""
    problem: str | None = "holds no whole checkpoint"
    for folder in [named] if named else checkpoints(run / "checkpoints"):
        problem = problem_of(folder)
        if problem is None:
            return folder
        if named is None:
            log.warning("%s: %s; trying the one before", folder.name, problem)
    if name == LAST:
        return None
    raise UserError(f"--resume_from_checkpoint {name}: {problem}; name another one, or use last")


def _read(folder: Path) -> Checkpoint:
    state = read_state(folder)
    if folder.name != f"step-{state.step}":
        raise UserError(f"{folder}: was saved at step {state.step}; rename it back to step-{state.step}")
    if extra := unlisted(folder):
        raise UserError(f"{folder / extra[0]}: is not listed in {CHECKSUMS}, so it cannot be checked; remove it")
    return Checkpoint(folder, state)


def _inside_batch(folder: Path, config: RunConfig) -> str | None:
    """Why a run with several optimizer steps a batch cannot resume here; None if it can. Completions are not saved, so
    it resumes only between two batches."""
    step, steps_per_batch = step_of(folder.name), getattr(config, "num_iterations", 1)
    assert step is not None
    if step % steps_per_batch == 0 or step >= (config.max_steps or step):
        return None
    return f"was saved between two optimizer steps on the same completions (--num_iterations {steps_per_batch})"


def _parse(name: str, output_dir: str | None) -> tuple[Path, Path | None]:
    """(run folder, checkpoint folder or None for its newest) that `--resume_from_checkpoint` names."""
    if name == LAST:
        if output_dir is None:
            raise UserError("--resume_from_checkpoint last: needs --output_dir, the run to resume")
        return expand(output_dir).resolve(), None
    path = expand(name)
    if path.name == LAST and not path.exists():
        path = path.parent
    path = path.resolve()
    if not path.is_dir():
        suggestion = did_you_mean(name, "name a run folder or a checkpoint, or use last")
        raise UserError(f"--resume_from_checkpoint {name}: no such folder; {suggestion}")
    if step_of(path.name) is not None:
        return path.parent.parent, path
    return (path.parent if path.name == "checkpoints" else path), None
