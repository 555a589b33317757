"""`vtfast migrate`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

from vtfast.cli.arguments import Parser, one_of, whole_number
from vtfast.cli.migration import Outcome, migrate
from vtfast.cli.migration.convert import SYSTEMS
from vtfast.utils.files import expand, write_atomically
from vtfast.utils.terminal import printable, show


def run(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="vtfast migrate",
        description="Turn settings of R1-V, VisualThinker-R1-Zero, TRL or EasyR1 into a YAML file for --config, and"
        " print what each of them becomes.",
        epilog="example: vtfast migrate run_grpo.sh --rows 15000 --output mine.yaml",
        checks={"rows": whole_number(1), "from": one_of(*SYSTEMS)},
    )
    parser.add_argument("source", metavar="FILE|LINE", help="a YAML file, a shell script, or a launch line in quotes")
    add = parser.add_argument_group("input").add_argument
    add("--from", metavar="NAME", help=f"one of {', '.join(SYSTEMS)} (default: guessed)")
    add(
        "--rows",
        metavar="N",
        help="number of rows of the data set, to turn epochs into steps (default: unknown, and max_steps is not set)",
    )
    add = parser.add_argument_group("output").add_argument
    add("--output", metavar="FILE", help="a new YAML file (default: printed)")
    options = parser.parse(arguments, _find_problems)
    result = migrate(options.source, getattr(options, "from"), options.rows)
    head = f"read as settings of {SYSTEMS[result.system]} (--from names another)"
    report = "\n".join([head, *map(_line, result.outcomes)])
    warnings = "".join(f"\nwarning: {warning}" for warning in result.warnings)
    if options.output is not None:
        output = expand(options.output)
        write_atomically(output, result.to_yaml())
        show(report)
        show(f"written: {output}; next: python train.py --config {output} --dry-run{warnings}")
    else:  # so that `> mine.yaml` holds the settings alone
        print(printable(report), file=sys.stderr)
        show(result.to_yaml().rstrip("\n"))
        sys.stdout.flush()  # the warning stands behind the settings on a terminal
        if warnings:
            print(printable(warnings.strip()), file=sys.stderr)
    return 0


def _find_problems(options: argparse.Namespace) -> Iterator[str]:
    if options.output is not None:
        output = expand(options.output)
        if output.exists():
            yield f"--output {output}: exists already; name a new file"
        elif not output.absolute().parent.is_dir():
            yield f"--output {output}: {output.parent} is not a folder; make it, or name another"


def _line(outcome: Outcome) -> str:
    value = "" if outcome.value in ("", None, []) else f" {outcome.value}"
    ours = ", ".join(f"{name} {value}" for name, value in outcome.to.items()) or "dropped"
    return f"  {outcome.name}{value} -> {ours}" + (f"   ({outcome.note})" if outcome.note else "")
