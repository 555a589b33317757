"""What is wrong with the settings, reported all at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vtfast.utils.errors import UserError


@dataclass(frozen=True)
class Problem:
    message: str
    fields: tuple[str, ...] = ()
    """Names of the settings that the message is about."""


class SettingsError(UserError):
    """One line for a single problem; for several a count, and each on a line of its own."""

    def __init__(self, problems: Iterable[str | Problem]) -> None:
        self.details = [Problem(problem) if isinstance(problem, str) else problem for problem in problems]
        self.problems = [problem.message for problem in self.details]
        if len(self.problems) == 1:
            super().__init__(self.problems[0])
        else:
            lines = "".join(f"\n  {problem}" for problem in self.problems)
            super().__init__(f"{len(self.problems)} problems:{lines}")
