"""`vtfast make-base`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vtfast.commands.parser import Parser
from vtfast.errors import UserError


def run(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="vtfast make-base",
        description="Train the demo's base model from nothing (about 10 minutes).",
    )
    parser.add_argument("path", metavar="OUT", help="new folder for the checkpoint")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of weights and scenes (default 0)"
    )
    options = parser.parse_args(arguments)
    if Path(options.path).exists():
        raise UserError(f"{options.path}: exists already; name a new folder")

    from vtfast.make_base import make_base

    make_base(options.path, seed=options.seed)
    return 0
