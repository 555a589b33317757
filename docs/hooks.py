"""The page of all settings, written from the docstrings under the fields of vtfast/config; formulas as MathML."""

import html
import re
from dataclasses import MISSING, fields

from latex2mathml.converter import convert

from vtfast.config import Config, SFTConfig, field_help
from vtfast.config import fields as sections


def on_page_markdown(markdown: str, page, **_) -> str:
    return markdown + settings() if page.file.src_path == "settings.md" else markdown


def on_page_content(content: str, **_) -> str:
    pattern = r'<(?:span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</(?:span|div)>'
    return re.sub(pattern, _mathml, content, flags=re.DOTALL)


def _mathml(found: re.Match) -> str:
    display = "block" if found[1] == "[" else "inline"
    return convert(html.unescape(found[2]).strip(), display=display)


def settings() -> str:
    """A table a section, each setting with its default and its help."""
    parts = []
    for section in (sections.Task, sections.GRPO, sections.SFT, sections.Rollout, sections.Optimizer, sections.Output):
        of_run = SFTConfig if section is sections.SFT else Config
        help_of = field_help(of_run)
        rows = [f"| `--{field.name}` | {_default(field)} | {_cell(help_of[field.name])} |" for field in fields(section)]
        title = f"## {section.__name__}\n\n{section.__doc__}\n"
        parts.append("\n".join([title, "| flag | default | |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _default(field) -> str:
    value = field.default if field.default is not MISSING else field.default_factory()
    if isinstance(value, list):
        value = ",".join(map(str, value)) or None
    return "" if value is None else f"`{value}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
