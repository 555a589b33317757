"""One self-contained HTML page about a run: it needs no server and no network, and runs no script but its own.

Text of a model is never markup. It is embedded as JSON without any `<`, the scripts insert it as text and not as HTML,
and a content security policy allows only the page's own script and style, by their hash, and no requests.
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
from vtfast.report.read_run import Run, read_runs
from vtfast.report.reflection import PATTERN, THRESHOLD, WORDS, first_step, in_words
from vtfast.utils.errors import UserError
from vtfast.utils.files import write_atomically

SCRIPTS = ("elements.js", "charts.js", "tables.js", "browser.js", "page.js")


def write_report(folders: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write a page about these run folders to `output` (default: report.html in the first) and return its path.

    The file is written whole or not at all. Raises UserError for a folder that is not a run folder and an `output` that
    cannot be written.
    """
    paths = [Path(folder) for folder in folders]
    path = Path(output) if output is not None else paths[0] / "report.html"
    if output is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise UserError(f"--output {path}: is not a file in an existing folder; name one")
    share = len(paths)
    try:
        runs = read_runs(paths)
        completions = [read_completions(run.folder, SHOWN // share, CHARACTERS // share) for run in runs]
        write_atomically(path, render(content(runs, completions)))
    except OSError as error:  # permissions, a full disk
        raise UserError(f"{error.filename or path}: {error.strerror}; no report was written") from error
    return path


def content(runs: Sequence[Run], completions: Sequence[Completions]) -> dict[str, Any]:
    """Everything that the page shows, as JSON values."""
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
                "notes": [*run.notes, *(of_run.notes if run.config.get("num_generations") else [])],
            }
            for run, of_run in zip(runs, completions, strict=True)
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
            "charts": charts.reflection_charts(runs, completions),
            "words": list(WORDS),
            "pattern": PATTERN,
            "threshold": THRESHOLD,
            "dated": [
                {"run": run.name, "text": in_words(of_run.shares), "step": first_step(of_run.shares)}
                for run, of_run in zip(runs, completions, strict=True)
            ],
        },
        "completions": {
            "total": sum(of_run.total for of_run in completions),
            "rows": [row | {"run": number} for number, of_run in enumerate(completions) for row in of_run.shown],
        },
    }


def render(data: dict[str, Any]) -> str:
    """The HTML file."""
    assets = files("vtfast.report") / "assets"
    style = (assets / "style.css").read_text("utf-8")
    script = "\n".join((assets / name).read_text("utf-8") for name in SCRIPTS)
    # string.Template replaces all placeholders in one pass, so that none in the data is replaced.
    return Template((assets / "page.html").read_text("utf-8")).substitute(
        policy=f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}",
        style=style,
        data=embed(data),
        script=script,
    )


def embed(data: Any) -> str:
    """JSON for a script element: no character in it can end the element or open a comment."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates cannot be encoded


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
