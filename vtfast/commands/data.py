"""`vtfast data inspect`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from vtfast.commands.parser import Parser
from vtfast.config import field_help, load_config, recipe_names
from vtfast.errors import UserError
from vtfast.terminal import show

SETTINGS = (
    "split", "static", "question_types", "question_column", "answer_column", "options_column", "image_column",
    "template", "literal_image", "model", "min_pixels", "max_pixels", "max_prompt_length", "seed",
)  # fmt: skip
"""Settings of a run that say how its data are read and asked."""


def run(arguments: Sequence[str]) -> int:
    help_of = field_help()
    parser = Parser(
        prog="vtfast data inspect",
        description="Tell what a data set holds: counts, sizes, prompt lengths, unusable rows, one prompt.",
        epilog="example: vtfast data inspect SAT_train.parquet --static true --limit 1000",
    )
    parser.add_argument("path", nargs="?", metavar="PATH", help=help_of["data"])
    parser.add_argument(
        "--recipe", help=f"inspect as this recipe would read: {', '.join(recipe_names())}"
    )
    parser.add_argument("--limit", metavar="N", help="read only the first N rows")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    for name in SETTINGS:
        parser.add_argument(f"--{name}", metavar="X", help=help_of[name].replace("%", "%%"))
    arguments = list(arguments)
    if arguments[:1] == ["inspect"]:
        arguments = arguments[1:]
    elif not {"-h", "--help"} & set(arguments):
        raise UserError("vtfast data: say what to do: vtfast data inspect PATH")
    flags = vars(parser.parse_args(arguments))
    if flags["path"] is None and flags["recipe"] is None:
        raise UserError("vtfast data inspect: give a PATH (a file, a folder or a hub id)")
    given = {name: flags[name] for name in SETTINGS if flags[name] is not None}
    if flags["path"] is not None:
        given["data"] = flags["path"]
    if flags["limit"] is not None:
        if not flags["limit"].isdecimal() or int(flags["limit"]) < 1:
            raise UserError(f"--limit {flags['limit']}: must be a whole number of at least 1")
        given["first_rows"] = flags["limit"]
    if flags["recipe"] is None:
        # The demo's recipe lends its model, which is the one at hand; its template is for that model alone.
        given = {"template": "r1-zero", **given}
    config = load_config(flags["recipe"] or "tiny-spatial", None, given)
    if config.data == "synthetic":
        raise UserError("vtfast data inspect: `synthetic` data are rendered by a run; give a PATH")

    from vtfast.data.inspection import inspect_data

    report = inspect_data(config)
    show(json.dumps(report.as_dict(), indent=2) if flags["json"] else report)
    return 0
