"""`vtfast train`, and `python train.py`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from vtfast.commands.parser import Parser
from vtfast.config import FIELD_NAMES, field_help, load_config, recipe_names
from vtfast.errors import UserError


def run(arguments: Sequence[str]) -> int:
    help_of = field_help()
    parser = Parser(
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
