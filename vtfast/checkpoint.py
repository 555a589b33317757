"""Run folders and checkpoints. A checkpoint is a Hugging Face model folder, whole or not there at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from vtfast.config import RunConfig
from vtfast.errors import UserError
from vtfast.files import expand
from vtfast.model import Policy
from vtfast.processor import Processor


def check_output_dir(config: RunConfig) -> None:
    """Raises UserError when `--output_dir` is a file, holds something already, or cannot be made."""
    if config.output_dir is None:
        return
    folder = expand(config.output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"--output_dir {folder}: exists and is not empty; a run is never written over"
        )
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    if not os.access(parent, os.W_OK):
        raise UserError(f"--output_dir {folder}: {parent} is not writable")


def create_run_folder(config: RunConfig) -> Path:
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


def save_checkpoint(
    folder: Path, policy: Policy, processor: Processor, keep: int | None = None
) -> None:
    """Write `folder` (…/checkpoints/step-N) so that `transformers` loads it; then drop all but the newest `keep`.

    The files are written beside it and renamed, so that a run that is killed leaves no half-written checkpoint.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    policy.module.save_pretrained(
        partial
    )  # with LoRA the adapters alone, which name their base model
    processor.save_pretrained(partial)
    partial.rename(folder)
    if keep is not None:
        steps = sorted(folder.parent.glob("step-*"), key=lambda path: int(path.name.split("-")[1]))
        for old in steps[:-keep]:
            shutil.rmtree(old)
