"""`vtfast report`."""

from __future__ import annotations

from collections.abc import Sequence

from vtfast.cli.arguments import Parser
from vtfast.utils.terminal import show


def run(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="vtfast report",
        description="Write one self-contained HTML page about a run, or about several side by side.",
        epilog="example: vtfast report runs/tiny-spatial runs/tiny-spatial-2 --output both.html",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folder")
    parser.add_argument("--output", metavar="FILE", help="the page (default: report.html in the first run folder)")
    options = parser.parse(arguments)

    from vtfast.report import write_report

    show(write_report(options.runs, options.output))
    return 0
