"""Text for messages: short, on one line."""

from __future__ import annotations


def shorten(text: object, longest: int = 200) -> str:
    """`text` with its middle left out if it has more than `longest` characters."""
    text, half = str(text), longest // 2
    return text if len(text) <= longest else f"{text[:half]}...{text[-half:]}"


def first_line(error: object, longest: int = 200) -> str:
    """The first line of an error's message, shortened; the name of its type if the message is empty."""
    lines = str(error).strip().splitlines()
    return shorten(lines[0], longest) if lines else type(error).__name__
