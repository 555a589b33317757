"""Text from data and models, made safe for a terminal: control characters are shown as escapes.

A row, a file name or a completion may hold ESC sequences that clear the screen, change the window's title or write to
the clipboard, and marks that reverse the direction of text. Everything that is printed or logged passes through here.
"""

from __future__ import annotations

import logging
import re
import sys

from vtfast.utils.text import shorten

LONGEST = 4000
"""Characters of one message: it may quote a row of megabytes."""
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and line feed, marks of direction, separators that end a line, lone surrogates."""


def printable(text: object) -> str:
    """`text` with every character that controls a terminal or has no UTF-8 written as `\\x1b` or
    `\\u202e`."""
    return _UNSAFE.sub(lambda match: ascii(match[0])[1:-1], str(text))


def message(text: object) -> str:
    """The printable text of an error, shortened: one line, or one for each of the error's `problems`."""
    problems = getattr(text, "problems", [text])
    if len(problems) > 1:
        return "".join([f"{len(problems)} problems:", *(f"\n  {message(one)}" for one in problems)])
    text = printable(" ".join(str(text).split("\n")))
    return shorten(text, LONGEST)


def show(text: object) -> None:
    """Print `text`. Characters that the terminal's encoding lacks are shown as escapes."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(printable(text).encode(encoding, "backslashreplace").decode(encoding))


class Formatter(logging.Formatter):
    """Log lines as printable text. Tracebacks keep their lines."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
