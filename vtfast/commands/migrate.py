"""`vtfast migrate`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from vtfast.commands.parser import Parser
from vtfast.errors import UserError
from vtfast.migrate import Fate, migrate
from vtfast.migrate.mapping import SYSTEMS


def run(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="vtfast migrate",
        description="Turn settings of R1-V, VisualThinker-R1-Zero, TRL or EasyR1 into a YAML file for --config.",
        epilog="example: vtfast migrate run_grpo.sh --rows 15000 --output mine.yaml",
    )
    parser.add_argument(
        "source",
        metavar="FILE|LINE",
        help="a YAML file, a shell script, or a launch line in quotes",
    )
    parser.add_argument(
        "--from",
        dest="system",
        metavar="NAME",
        help=f"one of {', '.join(SYSTEMS)} (default: guessed)",
    )
    parser.add_argument(
        "--rows", type=int, help="rows of the data set, which turn epochs into steps"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="a new YAML file (default: printed)"
    )
    options = parser.parse_args(arguments)
    if options.rows is not None and options.rows < 1:
        raise UserError(f"--rows {options.rows}: must be at least 1")
    if options.output and options.output.exists():
        raise UserError(f"--output {options.output}: exists already; name a new file")
    result = migrate(options.source, options.system, options.rows)
    head = f"read as settings of {SYSTEMS[result.system]} (--from names another)"
    said = "\n".join([head, *map(_line, result.fates)])
    if options.output:
        try:
            options.output.write_text(result.to_yaml())
        except OSError as error:
            raise UserError(
                f"--output {options.output}: cannot be written ({error.strerror})"
            ) from None
        print(
            f"{said}\nwritten: {options.output}; next: python train.py --config {options.output} --dry-run"
        )
    else:
        print(said, file=sys.stderr)  # so that `> mine.yaml` holds the settings alone
        print(result.to_yaml(), end="")
    return 0


def _line(fate: Fate) -> str:
    value = "" if fate.value in ("", None) else f" {fate.value}"
    ours = ", ".join(f"{name} {value}" for name, value in fate.to.items()) or "dropped"
    return f"  {fate.name}{value} -> {ours}" + (f"   ({fate.note})" if fate.note else "")
