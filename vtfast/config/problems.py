"""Everything that is wrong with the settings, told at once."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from numbers import Number
from typing import Any

from vtfast.utils.errors import UserError

LONGEST_SHOWN = 80


class SettingsError(UserError):
    """One line for a single problem; for several a count, and each on a line of its own."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        if len(self.problems) == 1:
            super().__init__(self.problems[0])
        else:
            lines = "".join(f"\n  {problem}" for problem in self.problems)
            super().__init__(f"{len(self.problems)} problems:{lines}")


def nearest(name: str, valid: Sequence[str], prefix: str = "") -> str:
    """How a message about an unknown `name` ends: the one that was meant, or all that there are."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {prefix}{close[0]}?"
    return f"; valid are {', '.join(sorted(valid))}"


def shown(value: Any) -> str:
    """A value on one line, and never much of it."""
    if isinstance(value, bytes) or not isinstance(value, str | Number | os.PathLike | None):
        return f"({type(value).__name__})"
    try:
        text = str(value)
    except ValueError:  # Python writes out no integer of more than some thousand digits
        return "(a number of thousands of digits)"
    if text == "" or not text.isprintable():
        text = repr(text)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
