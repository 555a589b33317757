"""One self-contained page: opened from disk, it needs no server and no network, and it runs no script but its own.

What a model wrote is data, never markup. It travels as JSON in which no `<` occurs, the scripts set it as text and not
as HTML, and a content security policy admits only the page's own script and style, by their hash, and no request.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from vtfast.report import charts, tables
from vtfast.report.completions import CHARACTERS, SHOWN, Completions, read_completions
from vtfast.report.reflection import PATTERN, THRESHOLD, WORDS, first_step, in_words
from vtfast.report.run_folder import Run, read_runs
from vtfast.report.without_script import summary
from vtfast.utils.errors import UserError
from vtfast.utils.files import write_whole

SCRIPTS = ("elements.js", "charts.js", "tables.js", "browser.js", "page.js")


def write_report(folders: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write the page about these run folders to `output` (default: report.html in the first) and return its path.

    The file appears whole or not at all. Raises UserError for a folder that is no run and an `output` that cannot be
    written.
    """
    paths = [Path(folder) for folder in folders]
    path = Path(output) if output is not None else paths[0] / "report.html"
    if output is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise UserError(f"--output {path}: not a file in an existing folder; name one")
    share = len(paths)
    try:
        runs = read_runs(paths)
        found = [read_completions(run.folder, SHOWN // share, CHARACTERS // share) for run in runs]
        write_whole(path, render(content(runs, found), summary(runs)))
    except OSError as error:  # permissions, a full disk
        raise UserError(f"{error.filename or path}: {error.strerror}; no report was written") from error
    return path


def content(runs: Sequence[Run], found: Sequence[Completions]) -> dict[str, Any]:
    """Everything that the page shows, as plain data."""
    several = len(runs) > 1
    freezing = [tables.frozen(run) for run in runs]
    by_freezing = several and len(set(freezing)) == len(runs)
    names = [run.name for run in runs]
    training = charts.training_charts(runs)
    evaluated = any(run.evaluations for run in runs)
    return {
        "title": ", ".join(names),
        "runs": [
            {
                "name": run.name,
                "status": run.status,
                "model": str(run.config.get("model", "")),
                "data": str(run.config.get("data", "")),
                "notes": [*run.notes, *(completions.notes if run.config.get("num_generations") else [])],
            }
            for run, completions in zip(runs, found, strict=True)
        ],
        "overview": tables.overview(runs),
        "held_out": tables.held_out(runs),
        "accuracy": charts.accuracy_charts(runs),
        "length": charts.length_chart(runs, freezing if by_freezing else names),
        "by_freezing": by_freezing,
        "differing": tables.differing_settings(runs) if several else None,
        "settings": [tables.settings(run) for run in runs if run.config],
        "training": [*charts.reward_charts(runs), *(chart for chart in training if not charts.is_zero(chart))],
        "zero": [chart["title"] for chart in training if charts.is_zero(chart)],
        "time": charts.time_charts(runs),
        "evaluated": evaluated,
        "paper_tables": [tables.table_3(runs), tables.table_5(runs)],
        "reflection": {
            "charts": charts.reflection_charts(runs, found),
            "words": list(WORDS),
            "pattern": PATTERN,
            "threshold": THRESHOLD,
            "dated": [
                {"run": run.name, "text": in_words(completions.shares), "step": first_step(completions.shares)}
                for run, completions in zip(runs, found, strict=True)
            ],
        },
        "completions": {
            "total": sum(completions.total for completions in found),
            "rows": [row | {"run": number} for number, completions in enumerate(found) for row in completions.shown],
        },
    }


def render(data: dict[str, Any], without_script: str) -> str:
    """The HTML file. `without_script`: HTML that stands for the rest where scripts are not allowed."""
    assets = files("vtfast.report") / "assets"
    style = (assets / "style.css").read_text("utf-8")
    script = "\n".join((assets / name).read_text("utf-8") for name in SCRIPTS)
    # string.Template replaces all slots in one pass, so that nothing in the data is taken for a slot.
    return Template((assets / "page.html").read_text("utf-8")).substitute(
        policy=f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}",
        style=style,
        without_script=without_script,
        data=embed(data),
        script=script,
    )


def embed(data: Any) -> str:
    """JSON that can stand inside a script element: no character in it can end the element or open a comment."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates have no UTF-8


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
