"""The folder of a run: a new one, the one that the run goes on in, or a new one for a fork."""

from __future__ import annotations

import os
from pathlib import Path

from vtfast.config import RunConfig
from vtfast.training.checkpoint.checksums import SETTINGS, copy_whole
from vtfast.training.checkpoint.find import LAST, Checkpoint
from vtfast.training.checkpoint.logs import SUPERSEDED, copy_logs, cut_back, set_aside
from vtfast.utils.errors import UserError
from vtfast.utils.files import expand, write_whole


def check_output_dir(config: RunConfig) -> None:
    """Raises UserError when `--output_dir` is a file, holds something that is not to be gone on with, or cannot be
    made."""
    if config.output_dir is None:
        return
    folder, wanted = expand(config.output_dir), config.resume_from_checkpoint
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder}: is a file")
    if folder.is_dir() and _holds_something(folder):
        if wanted is None:
            advice = "--resume_from_checkpoint last goes on with it" if _is_run(folder) else "name a new one"
            raise UserError(f"--output_dir {folder}: exists and is not empty; a run is never written over ({advice})")
        if not _is_run(folder):
            raise UserError(f"--output_dir {folder}: holds something, and no run to go on with")
        source = expand(wanted).resolve()
        if wanted != LAST and folder.resolve() not in (source, *source.parents):
            raise UserError(
                f"--output_dir {folder}: holds another run than --resume_from_checkpoint {wanted};"
                " name a new folder, or leave it out to go on with that run"
            )
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise UserError(f"--output_dir {folder}: {parent} is a file")
    if not os.access(parent, os.W_OK):
        raise UserError(f"--output_dir {folder}: {parent} is not writable")


def prepare_run_folder(config: RunConfig, checkpoint: Checkpoint | None) -> Path:
    """Make the folder ready for the steps after `checkpoint`, or for all of them, and leave config.yaml in it."""
    if checkpoint is None:
        folder = _new_folder(config)
        if _holds_something(folder):
            set_aside(folder)
    elif config.output_dir is not None and expand(config.output_dir).resolve() != checkpoint.run:
        folder = _new_folder(config)
        if _holds_something(folder):
            # Checkpoints without a config.yaml, or a run that has the checkpoint's folder somewhere inside.
            raise UserError(
                f"--output_dir {folder}: is not known as the run of {checkpoint.folder}, whose logs would be cut back;"
                f" name a new folder, or put config.yaml back into the run's ({SETTINGS} is a copy)"
            )
        if checkpoint.run:
            copy_logs(checkpoint.run, folder, checkpoint.state.step)
    elif checkpoint.run:
        folder = expand(config.output_dir or checkpoint.run)
        cut_back(folder, checkpoint.state.step)
    else:
        raise UserError(
            f"--resume_from_checkpoint {checkpoint.folder}: lies in no run folder, which would have a config.yaml; name"
            " a new --output_dir"
        )
    (folder / "checkpoints").mkdir(exist_ok=True)
    write_whole(folder / "config.yaml", settings(config))
    return folder


def keep_data(rendered: Path, run: Path) -> None:
    """Leave the rendered questions, if there are any, in RUN/data, unless a start before this one has."""
    if rendered.exists() and not (run / "data").exists():
        copy_whole(rendered, run / "data")


def settings(config: RunConfig) -> str:
    """config.yaml. From where a run has been resumed is no setting of it."""
    return config.model_copy(update={"resume_from_checkpoint": None}).to_yaml()


def _new_folder(config: RunConfig) -> Path:
    """The folder of `--output_dir`, or the first of runs/RECIPE, runs/RECIPE-2, ... that is free."""
    if config.output_dir is not None:
        folder = expand(config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    number = 1
    while True:
        folder = Path("runs") / (config.recipe if number == 1 else f"{config.recipe}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1


def _holds_something(folder: Path) -> bool:
    """Files that a killed start may leave begin with a dot; what has been set aside counts for nothing either."""
    return any(not path.name.startswith((".", SUPERSEDED)) for path in folder.iterdir())


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() or (folder / "checkpoints").is_dir()
