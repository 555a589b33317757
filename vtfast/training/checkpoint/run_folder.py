"""The folder of a run: a new one, the one that a resumed run continues in, or a new one for a fork."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from vtfast.config import RunConfig
from vtfast.training.checkpoint.checksums import SETTINGS, copy_whole
from vtfast.training.checkpoint.find import LAST, Checkpoint
from vtfast.training.checkpoint.logs import SUPERSEDED, copy_logs, cut_back, make_first_free, set_aside
from vtfast.utils.errors import UserError
from vtfast.utils.files import expand, write_atomically


def check_output_dir(config: RunConfig) -> None:
    """Raises UserError if `--output_dir` is a file, holds files but not the run to resume, or cannot be made."""
    if config.output_dir is None:
        return
    folder = expand(config.output_dir)
    if problem := _output_dir_problem(folder, config.resume_from_checkpoint):
        raise UserError(f"--output_dir {folder}: {problem}")


def _output_dir_problem(folder: Path, resume_from: str | None) -> str | None:
    exists = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not exists.is_dir() or not os.access(exists, os.W_OK):
        return f"{exists} is not a folder that can be written to"
    if exists != folder or not _is_in_use(folder):
        return None
    if resume_from is None:
        advice = "--resume_from_checkpoint last resumes it" if _is_run(folder) else "name a new one"
        return f"exists and is not empty; a run is never overwritten ({advice})"
    if not _is_run(folder):
        return "holds files, but no run to resume"
    source = expand(resume_from).resolve()
    if resume_from != LAST and folder.resolve() not in (source, *source.parents):
        return (
            f"holds another run than --resume_from_checkpoint {resume_from}; name a new folder, or leave --output_dir"
            " out to resume that run in its own folder"
        )
    return None


def prepare_run_folder(config: RunConfig, checkpoint: Checkpoint | None) -> Path:
    """Prepare the folder for the steps after `checkpoint` (None: for all steps) and write config.yaml."""
    if checkpoint is None:
        folder = _new_folder(config)
        if _is_in_use(folder):
            set_aside(folder)
    elif config.output_dir is not None and expand(config.output_dir).resolve() != checkpoint.run:
        folder = _new_folder(config)
        if _is_in_use(folder):
            # It holds checkpoints but no config.yaml, or the checkpoint lies deeper than in its `checkpoints`.
            raise UserError(
                f"--output_dir {folder}: is not the run folder of {checkpoint.folder}; name a new folder, or, if it is,"
                f" put config.yaml back into it ({SETTINGS} is a copy)"
            )
        if checkpoint.run:
            copy_logs(checkpoint.run, folder, checkpoint.state.step)
    elif checkpoint.run:
        folder = expand(config.output_dir or checkpoint.run)
        cut_back(folder, checkpoint.state.step)
    else:
        raise UserError(
            f"--resume_from_checkpoint {checkpoint.folder}: does not lie in a run folder (which has a config.yaml);"
            " name a new --output_dir"
        )
    (folder / "checkpoints").mkdir(exist_ok=True)
    write_atomically(folder / "config.yaml", settings(config))
    return folder


def keep_data(rendered: Path, run: Path) -> None:
    """Copy the rendered questions, if there are any, to RUN/data, unless an earlier start has."""
    if rendered.exists() and not (run / "data").exists():
        copy_whole(rendered, run / "data")


def settings(config: RunConfig) -> str:
    """The text of config.yaml. It leaves out `resume_from_checkpoint`, which is not a setting of the run itself."""
    return config.model_copy(update={"resume_from_checkpoint": None}).to_yaml()


def _new_folder(config: RunConfig) -> Path:
    """The folder of `--output_dir`, or the first of runs/RECIPE, runs/RECIPE-2, ... that does not exist yet."""
    if config.output_dir is not None:
        folder = expand(config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    suffixes = ("" if number == 1 else f"-{number}" for number in itertools.count(1))
    return make_first_free(Path("runs") / f"{config.recipe}{suffix}" for suffix in suffixes)


def _is_in_use(folder: Path) -> bool:
    """Whether a folder holds more than leftovers of a killed start (names with a dot) and superseded files."""
    return any(not path.name.startswith((".", SUPERSEDED)) for path in folder.iterdir())


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() or (folder / "checkpoints").is_dir()
