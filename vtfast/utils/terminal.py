"""Text from data and models on a terminal: what would steer it is shown as an escape, not obeyed.

A row, a file name or an answer may hold ESC sequences that clear the screen, change the window's title or write to the
clipboard, and marks that turn the direction of what follows. Everything that is printed or logged passes here.
"""

from __future__ import annotations

import logging
import re
import sys

LONGEST = 4000
"""Characters of one message: a row that is quoted in it may be megabytes long."""
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and line feed, marks of direction, separators that end a line, lone surrogates."""


def printable(text: object) -> str:
    """`text` with every character that would steer a terminal, or that has no UTF-8, as `\\x1b` or `\\u202e`."""
    return _UNSAFE.sub(lambda found: ascii(found[0])[1:-1], str(text))


def message(text: object) -> str:
    """`printable` text of an error: one line, without its middle where that is longer than a person would read. Of an
    error with several `problems`, a line each."""
    problems = getattr(text, "problems", [text])
    if len(problems) > 1:
        return "".join([f"{len(problems)} problems:", *(f"\n  {message(one)}" for one in problems)])
    text = printable(" ".join(str(text).split("\n")))
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]} [...] {text[-half:]}"


def show(text: object) -> None:
    """Print `text` for a person. Characters that the terminal's encoding lacks are shown as escapes."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(printable(text).encode(encoding, "backslashreplace").decode(encoding))


class Formatter(logging.Formatter):
    """A log's lines as printable text. Tracebacks keep their lines."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
