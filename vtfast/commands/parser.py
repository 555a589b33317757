"""argparse, with this project's manners."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

from vtfast.config.problems import SettingsError
from vtfast.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse with our exit path: a UserError that names the nearest valid flag, and no abbreviations."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def parse_args(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Raises UserError, in which every unknown flag is named."""
        options, problems = self.parse_known(arguments)
        if problems:
            raise SettingsError(problems)
        return options

    def parse_known(self, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """-> options, what is wrong with the others: a line for each unknown flag and each stray word."""
        options, unknown = self.parse_known_args(arguments)
        problems, of_flag = [], False
        for word in unknown:
            if word.startswith("-") and len(word) > 1:
                problems.append(self._unknown_flag(word.split("=")[0]))
            elif not of_flag:
                problems.append(f"{word}: does not belong to any flag; see {self.prog} --help")
            of_flag = word.startswith("-") and "=" not in word
        return options, problems

    def _unknown_flag(self, flag: str) -> str:
        close = difflib.get_close_matches(flag, self._option_string_actions, n=1)
        hint = f"did you mean {close[0]}?" if close else f"see {self.prog} --help"
        return f"{flag}: unknown flag; {hint}"

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")
