"""`vtfast data inspect`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from vtfast.cli.arguments import Parser, setting_help, whole_number
from vtfast.config import Config, field_defaults, field_help, load_config
from vtfast.utils.errors import UserError
from vtfast.utils.terminal import show

SETTINGS = {
    "which rows": ("split", "static", "question_types"),
    "what their columns are called": ("question_column", "answer_column", "options_column", "image_column"),
    "how they are asked": (
        "template",
        "literal_image",
        "model",
        "min_pixels",
        "max_pixels",
        "max_prompt_length",
        "seed",
    ),
}
"""Settings of a run that say how its data are read and asked, by heading."""
RECIPE = "tiny-spatial"
"""Lends its model, which is the one at hand; its template is for that model alone."""
TEMPLATE = "r1-zero"


def run(arguments: Sequence[str]) -> int:
    arguments = list(arguments)
    if arguments[:1] == ["inspect"]:
        arguments = arguments[1:]
    elif not {"-h", "--help"} & set(arguments):
        raise UserError("vtfast data: say what to do: vtfast data inspect PATH")
    options, problems = _parser().parse_known(arguments)
    flags = vars(options)
    names = [name for part in SETTINGS.values() for name in part]
    given = {name: flags[name] for name in names if flags[name] is not None}
    given |= {"data": flags["path"]} if flags["path"] is not None else {}
    given |= {"first_rows": flags["limit"]} if flags["limit"] is not None else {}
    if flags["path"] is None and flags["recipe"] is None:
        problems.append("vtfast data inspect: give a PATH (a file, a folder or a hub id)")
    if flags["recipe"] is None:
        given = {"template": TEMPLATE, **given}
    config = load_config(flags["recipe"] or RECIPE, None, given, kind=Config, known_problems=problems)
    if config.data == "synthetic":
        raise UserError("vtfast data inspect: `synthetic` data are rendered by a run; give the PATH of others")

    from vtfast.data.inspection import inspect_data

    report = inspect_data(config)
    show(json.dumps(report.as_dict(), indent=2) if flags["json"] else report)
    return 0


def _parser() -> Parser:
    help_of, default_of = field_help(), field_defaults() | {"template": TEMPLATE}
    parser = Parser(
        prog="vtfast data inspect",
        usage="vtfast data inspect [-h] [--limit N] [--json] [--recipe NAME] [--SETTING VALUE ...] PATH",
        description="Tell what a data set holds: counts, sizes, prompt lengths, unusable rows, one prompt. The flags"
        " are those of a run.",
        epilog="example: vtfast data inspect SAT_train.parquet --static true --limit 1000",
        checks={"limit": whole_number(1)},
    )
    parser.add_argument(
        "path",
        nargs="?",
        metavar="PATH",
        help="questions: a parquet, JSONL or JSON file, a folder, or a hub id (default: the recipe's)",
    )
    parser.add_argument("--limit", metavar="N", help="read only the first N rows (default all)")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="read and ask as this recipe would; vtfast train --help lists them (default none)",
    )
    for title, names in SETTINGS.items():
        group = parser.add_argument_group(title)
        for name in names:
            group.add_argument(f"--{name}", metavar="X", help=setting_help(help_of[name], default_of[name]))
    return parser
