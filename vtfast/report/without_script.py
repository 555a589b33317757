"""What the page says where scripts are not allowed: each run's result, held-out table, last step and settings, as plain
HTML. Everything of the run is text here, escaped; nothing is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from vtfast.report import tables
from vtfast.report.run_folder import Run
from vtfast.utils.terminal import printable

LEAD = "The charts and the answers need this page's script, which is not allowed here. What needs none:"
FILES = {"curves.png": "the curves", "metrics.jsonl": "every step", "completions.jsonl": "every answer"}


def summary(runs: Sequence[Run]) -> str:
    """The inside of the page's noscript element."""
    before_and_after = tables.held_out(runs)
    title = _text(", ".join(run.name for run in runs))
    parts = [f"<h1>{title}</h1>\n<p>{LEAD}</p>"]
    parts += [_table(tables.overview(runs)), *map(_table, before_and_after)]
    if not before_and_after:
        parts.append("<p>There is no held-out accuracy: none was asked for, or the run goes on.</p>")
    if any(run.evaluations for run in runs):
        parts.append(_table(tables.table_3(runs)))
    for run in runs:
        parts.append(f"<h2>{_text(run.name)}</h2>\n<p>{_text(run.status)}. {_files(run)}</p>")
        parts += [f"<p>{_text(note)}</p>" for note in run.notes]
        parts += [_table(tables.last_step(run))] if run.metrics else []
        parts += [_table(tables.settings(run) | {"caption": "Settings"})] if run.config else []
    return "\n".join(parts)


def _files(run: Run) -> str:
    """Which files hold the rest."""
    there = [name for name in FILES if (run.folder / name).is_file()]
    if not there:
        return f"Its folder, <code>{_text(run.folder)}</code>, holds no more."
    names = ", ".join(f"<code>{name}</code> ({FILES[name]})" for name in there)
    return f"In its folder, <code>{_text(run.folder)}</code>: {names}."


def _table(table: tables.Table) -> str:
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in table["columns"])
    rows = "\n".join(map(_row, table["rows"]))
    caption = ". ".join(filter(None, (table["caption"], table.get("note"))))
    return (
        f'<figure class="table"><figcaption>{_text(caption)}</figcaption><div class="scroll">\n<table>'
        f"<thead><tr><td></td>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div></figure>"
    )


def _row(row: Mapping[str, Any]) -> str:
    label = _text(row["label"]) + (" (paper)" if row.get("paper") else "")
    note = f"<small>{_text(row['note'])}</small>" if row.get("note") else ""
    cells = "".join(f"<td>{_text(cell)}</td>" for cell in row["cells"])
    return f'<tr><th scope="row">{label}{note}</th>{cells}</tr>'


def _text(value: object) -> str:
    """No character of it is markup, and none steers the page: control characters and marks of direction are shown."""
    return escape(printable(value))
