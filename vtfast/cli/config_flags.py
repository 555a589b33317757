"""The flags that `vtfast train` and `vtfast sft` share: one for each setting."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TypeVar

from vtfast.cli.arguments import Parser, setting_help
from vtfast.config import (
    Config,
    RunConfig,
    SFTConfig,
    field_defaults,
    field_help,
    field_names,
    field_sections,
    load_config,
    recipe_names,
)

SPELLINGS = {
    "batch_size": "per_device_train_batch_size",
    "dataset": "data",
    "dataset_name": "data",
    "epochs": "num_train_epochs",
    "eval_dataset": "eval_data",
    "grad_accum": "gradient_accumulation_steps",
    "group_size": "num_generations",
    "kl_coef": "beta",
    "lora": "use_peft",
    "lr": "learning_rate",
    "max_new_tokens": "max_completion_length",
    "model_name_or_path": "model",
    "output": "output_dir",
    "resume": "resume_from_checkpoint",
    "reward": "reward_funcs",
    "rewards": "reward_funcs",
    "steps": "max_steps",
    "torch_dtype": "dtype",
    "warmup": "warmup_steps",
}
"""Names that other trainers and habit have for some settings."""
Kind = TypeVar("Kind", Config, SFTConfig)


def read_settings(arguments: Sequence[str], kind: type[Kind], *, prog: str, description: str) -> Kind | None:
    """The settings of a command line; None for --dry-run, which prints them instead."""
    names = [name for name in field_names(kind) if name != "recipe"]
    own = field_defaults(kind)["recipe"]
    parser = Parser(
        hints=_hints(kind),
        prog=prog,
        usage=f"{prog} [--recipe NAME | --config FILE] [--SETTING VALUE ...] [--dry-run]",
        description=f"{description} Each setting is shown with its default. A recipe changes some of them;"
        " --dry-run prints the settings that result. --help_all prints the whole help of each setting.",
        epilog=f"example: {prog} --recipe {own} --seed 1 --max_steps 50",
    )
    parser.add_argument("--recipe", metavar="NAME", help=f"one of {', '.join(recipe_names(kind))} (default {own})")
    parser.add_argument("--config", metavar="FILE", help="a YAML file of settings instead of a recipe")
    parser.add_argument(
        "--dry_run",
        "--dry-run",
        action="store_true",
        help="print the resolved settings and, as comments, an estimate of memory and steps; then stop",
    )
    parser.add_argument(
        "--gpu_memory_gb",
        metavar="X",
        help="the GPU of that estimate, if it is not this machine's: its GB, or a name such as A100-40, H100 or H200",
    )
    parser.add_argument("--help_all", action="help", help="this help with every word about each setting")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    _add_settings(parser, kind, short="--help_all" not in arguments)
    options, problems = parser.parse_known(arguments)
    flags = vars(options)
    given = {name: flags[name] for name in names if flags[name] is not None}
    if flags["recipe"] and flags["config"]:
        problems.append("--recipe and --config: give one of them; a --config file replaces the recipe")
    file, resumed = flags["config"], given.get("resume_from_checkpoint")
    if resumed and not flags["recipe"] and not file:
        from vtfast.training.checkpoint import settings_of  # brings torch

        file = settings_of(resumed, given.get("output_dir"))
        if file:  # the run may have been moved since, so its own output_dir does not count
            given = {"output_dir": None} | given
    if flags["gpu_memory_gb"] and not flags["dry_run"]:
        problems.append("--gpu_memory_gb: has no effect without --dry-run; leave it out, or add that")
    config = load_config(flags["recipe"], file, given, kind=kind, known_problems=problems)
    if flags["dry_run"]:
        estimate = _estimate(config, flags["gpu_memory_gb"])  # first: it may refuse the GPU's name
        print(config.to_yaml() + estimate)
        return None
    return config


def _hints(kind: type[RunConfig]) -> dict[str, str]:
    """By flag: the hint for a setting under another name, or for one that the other kind of run has."""
    names, other = field_names(kind), SFTConfig if kind is Config else Config
    command = "train" if other is Config else "sft"
    hints = {name: f"vtfast {command} has it" for name in field_names(other) if name not in names} | {
        spelling: f"did you mean --{name}?" for spelling, name in SPELLINGS.items() if name in names
    }
    if kind is Config:  # GRPO counts steps
        hints |= dict.fromkeys(("epochs", "num_train_epochs"), "did you mean --max_steps?")
    return {f"--{name}": hint for name, hint in hints.items()}


def _add_settings(parser: Parser, kind: type[RunConfig], short: bool) -> None:
    """A flag for each setting, grouped by section. `short`: only the first statement of its help."""
    help_of, default_of = field_help(kind), field_defaults(kind)
    for section, names in field_sections(kind).items():
        group = parser.add_argument_group(section.__name__, section.__doc__)
        for name in names:
            if name != "recipe":
                # `--use_peft` alone means true, as in TRL
                bare = default_of[name] in ("true", "false")
                group.add_argument(
                    f"--{name}",
                    metavar="X",
                    help=setting_help(help_of[name], default_of[name], short),
                    nargs="?" if bare else None,
                    const="true" if bare else None,
                )


def _estimate(config: RunConfig, gpu_memory_gb: str | None) -> str:
    """An estimate of what a run with these settings takes, and what would stop it on this machine: as YAML comments, so
    that the output of a dry run is a settings file."""
    from vtfast.cli.dry_run import estimate
    from vtfast.training.preflight import find_problems

    lines = list(estimate(config, gpu_memory_gb))
    lines += [f"warning: {warning}" for warning in config.warnings()]
    text = "\n".join(lines)
    lines += [f"would stop here: {p}" for p in find_problems(config) if p.partition(": ")[2] not in text]
    return "\n".join(["#", *(f"# {line}".rstrip() for line in lines)])
