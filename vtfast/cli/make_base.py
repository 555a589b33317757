"""`vtfast make-base`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence

from vtfast.cli.arguments import Parser, whole_number
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
    options = parser.parse(arguments, _find_problems)

    from vtfast.cli.demo_model.recipe import make_base

    make_base(expand(options.path), seed=options.seed)
    return 0


def _find_problems(options: argparse.Namespace) -> Iterator[str]:
    """Before ten minutes of training: whether the folder is new and can be made."""
    if options.path is None:
        return
    path = expand(options.path)
    parent = next((p for p in path.absolute().parents if p.exists()), path)
    if path.exists():
        yield f"{path}: exists already; name a new folder"
    elif not parent.is_dir() or not os.access(parent, os.W_OK):
        yield f"{path}: cannot be made in {path.parent}; name a folder that can"
