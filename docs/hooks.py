"""The page of all settings, written from the fields of vtfast/config; formulas as MathML."""

import html
import re

from latex2mathml.converter import convert

from vtfast.config import Config, SFTConfig, field_defaults, field_help
from vtfast.config.describe import SECTIONS


def on_page_markdown(markdown: str, page, **_) -> str:
    return markdown + settings() if page.file.src_path == "settings.md" else markdown


def on_page_content(content: str, **_) -> str:
    pattern = r'<(?:span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</(?:span|div)>'
    return re.sub(pattern, _mathml, content, flags=re.DOTALL)


def _mathml(found: re.Match) -> str:
    display = "block" if found[1] == "[" else "inline"
    return convert(html.unescape(found[2]).strip(), display=display)


def settings() -> str:
    """A table per section: each setting with its default and its help."""
    parts = []
    for section in SECTIONS:
        kind = Config if issubclass(Config, section) else SFTConfig
        help_of, default_of = field_help(kind), field_defaults(kind)
        rows = [
            f"| `--{name}` | {_default(default_of[name])} | {_cell(help_of[name])} |" for name in section.model_fields
        ]
        title = f"## {section.__name__}\n\n{section.__doc__}\n"
        parts.append("\n".join([title, "| flag | default | |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _default(value: str) -> str:
    return "" if value == "none" else f"`{value}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
