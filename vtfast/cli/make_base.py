"""`vtfast make-base`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vtfast.cli.arguments import Parser, whole_number
from vtfast.config import SettingsError
from vtfast.utils.files import expand


def run(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="vtfast make-base",
        description="Train the demo's base model from nothing (about 10 minutes).",
        epilog="example: vtfast make-base my-base --seed 1",
        checks={"seed": whole_number(0)},
    )
    parser.add_argument("path", metavar="OUT", help="new folder for the checkpoint")
    parser.add_argument("--seed", default=0, metavar="N", help="seed of weights and scenes (default 0)")
    options, problems = parser.parse_known(arguments)
    path = None if options.path is None else expand(options.path)
    if path is not None and path.exists():
        problems.append(f"{path}: exists already; name a new folder")
    elif path is not None and not _can_be_made(path):
        problems.append(f"{path}: cannot be made in {path.parent}; name a folder that can")
    if problems or path is None:
        raise SettingsError(problems)

    from vtfast.cli.demo_model.recipe import make_base

    make_base(path, seed=options.seed)
    return 0


def _can_be_made(folder: Path) -> bool:
    """Checked before ten minutes of training."""
    parent = next(p for p in folder.absolute().parents if p.exists())
    return parent.is_dir() and os.access(parent, os.W_OK)
