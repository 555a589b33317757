"""The command line: `vtfast COMMAND`, and `python train.py` for `vtfast train`.

Nothing heavy is imported before a command needs it, so that help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from vtfast.config import FIELD_NAMES, field_help, load_config, recipe_names
from vtfast.errors import UserError

BAD_INPUT = 2
"""Exit code of every error that is the input's fault."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. A UserError becomes one line on standard error."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(_USAGE)
        return 0
    try:
        if command not in _COMMANDS:
            close = difflib.get_close_matches(command, _COMMANDS, n=1)
            raise UserError(
                f"vtfast {command}: unknown command; did you mean {(close or ['train'])[0]}?"
            )
        _prepare()
        return _COMMANDS[command](arguments[1:])
    except UserError as error:
        rank = int(os.environ.get("RANK", 0))
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one voice a machine
            print(f"error: {error}" + (f" (rank {rank})" if rank else ""), file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _train(arguments: Sequence[str]) -> int:
    help_of = field_help()
    parser = _Parser(
        prog="train.py",
        description="Train a vision-language model with GRPO.",
        epilog="example: python train.py --recipe tiny-spatial --seed 1 --max_steps 50",
    )
    parser.add_argument(
        "--recipe", help=f"one of {', '.join(recipe_names())} (default tiny-spatial)"
    )
    parser.add_argument(
        "--config", metavar="FILE", help="a YAML file of settings instead of a recipe"
    )
    parser.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="print the resolved settings and stop"
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    for name in FIELD_NAMES:
        if name != "recipe":
            parser.add_argument(f"--{name}", metavar="X", help=help_of[name].replace("%", "%%"))
    flags = vars(parser.parse_args(arguments))
    given = {
        name: flags[name] for name in FIELD_NAMES if flags[name] is not None and name != "recipe"
    }
    if flags["recipe"] and flags["config"]:
        raise UserError(
            "--recipe and --config: give one of them; a --config file stands for itself"
        )
    config = load_config(flags["recipe"] or "tiny-spatial", flags["config"], given)
    if flags["dry_run"]:
        print(config.to_yaml(), end="")
        return 0

    from transformers.utils import logging as transformers_logging

    from vtfast.trainer import Trainer

    transformers_logging.disable_progress_bar()
    Trainer(config).run()
    return 0


def _make_base(arguments: Sequence[str]) -> int:
    parser = _Parser(
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


class _Parser(argparse.ArgumentParser):
    """argparse with our exit path: a UserError that names the nearest valid flag, and no abbreviations."""

    def __init__(self, **settings) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def parse_args(self, arguments: Sequence[str]) -> argparse.Namespace:
        options, unknown = self.parse_known_args(arguments)
        if unknown:
            flag = unknown[0].split("=")[0]
            close = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            hint = f"did you mean {close[0]}?" if close else f"see {self.prog} --help"
            raise UserError(f"{flag}: unknown flag; {hint}")
        return options

    def error(self, message: str) -> None:
        raise UserError(f"{message}; see {self.prog} --help")


def _prepare() -> None:
    """Before torch is imported: how threads wait, and who speaks. Our own log on rank 0, of the libraries errors."""
    rank = os.environ.get("RANK", "0")
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    logging.getLogger("vtfast").setLevel(logging.INFO if rank == "0" else logging.ERROR)
    # OpenMP threads that spin while they wait make a step ten times slower as soon as anything else runs on a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)


_COMMANDS = {"train": _train, "make-base": _make_base}
_USAGE = """usage: vtfast COMMAND ...

  train       train a model with GRPO (the same as python train.py)
  make-base   train the demo's base model from nothing

`vtfast COMMAND --help` lists a command's flags.
example: vtfast train --recipe tiny-spatial --seed 1"""
