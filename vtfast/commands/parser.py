"""argparse, with this project's manners."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from vtfast.config.problems import SettingsError
from vtfast.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse with our exit path: a UserError that names the nearest valid flag, and no abbreviations."""

    def __init__(self, *, hints: Mapping[str, str] | None = None, **settings: Any) -> None:
        """`hints`: what to say of flags that this parser lacks and people try."""
        super().__init__(allow_abbrev=False, **settings)
        self.hints = hints or {}

    def parse_args(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Raises UserError, in which every unknown flag is named."""
        options, problems = self.parse_known(arguments)
        if problems:
            raise SettingsError(problems)
        return options

    def parse_known(self, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """-> options, what is wrong with the others: a line for each unknown flag, each stray word, and each argument
        that is missing. argparse names nothing else where one is missing, though it may be there, misspelt."""
        helps = {"-h", "--help"} & set(arguments)  # its usage line tells what is required
        needed = [action for action in self._actions if action.required and not helps]
        for action in needed:
            action.required = False
        try:
            options, unknown = self.parse_known_args(arguments)
        finally:
            for action in needed:
                action.required = True
        problems, of_flag = [], False
        for word in unknown:
            if word.startswith("-") and len(word) > 1:
                problems.append(self._unknown_flag(word.split("=")[0]))
            elif not of_flag:
                problems.append(f"{word}: does not belong to any flag; see {self.prog} --help")
            of_flag = word.startswith("-") and "=" not in word
        for action in needed:
            if getattr(options, action.dest) in (None, []):
                name = action.option_strings[0] if action.option_strings else action.metavar
                problems.append(f"{name}: is required; see {self.prog} --help")
        return options, problems

    def _unknown_flag(self, flag: str) -> str:
        close = difflib.get_close_matches(flag, [*self._option_string_actions, *self.hints], n=1)
        hint = f"did you mean {close[0]}?" if close else f"see {self.prog} --help"
        if close:
            hint = self.hints.get(close[0], hint)
        return f"{flag}: unknown flag; {hint}"

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")
