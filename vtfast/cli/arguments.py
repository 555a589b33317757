"""argparse, with this project's manners."""

from __future__ import annotations

import argparse
import difflib
import itertools
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from vtfast.config.problems import SettingsError
from vtfast.config.values import BadValue, convert
from vtfast.utils.errors import UserError

Check = Callable[[str], Any]
"""The text behind a flag -> its value. Raises BadValue."""
_END = re.compile(r"(?<=\w\w[.]) +(?=[A-Z`])|; (?!none|false|auto|0|`)")
"""Where a setting's first statement ends: at a full stop, or at a semicolon behind which no value is explained."""
NOTHING = object()
"""Stands for the value of a flag that got none."""


class WholeWords(argparse.HelpFormatter):
    """Breaks lines between words alone: the name of a recipe is copied in one piece."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        words = " ".join(text.split())
        return textwrap.wrap(words, width, break_on_hyphens=False, break_long_words=False)


class Parser(argparse.ArgumentParser):
    """argparse with our exit path: a UserError that names the nearest valid flag, and no abbreviations."""

    def __init__(
        self, *, hints: Mapping[str, str] | None = None, checks: Mapping[str, Check] | None = None, **settings: Any
    ) -> None:
        """`hints`: what to say of flags that this parser lacks and people try, and of words that belong to none.
        `checks`: of options by their names.
        argparse's own `type` and `choices` would stop at the first value that they refuse."""
        super().__init__(allow_abbrev=False, **{"formatter_class": WholeWords} | settings)
        self.hints = hints or {}
        self.checks = checks or {}

    def parse_args(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Raises UserError, in which everything that is wrong is named."""
        options, problems = self.parse_known(arguments)
        if problems:
            raise SettingsError(problems)
        return options

    def parse_known(self, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """-> options, what is wrong with the others: a line for each unknown flag, each stray word, each flag without
        its value or with one that its check refuses (None among the options then), and each argument that is missing.
        argparse names nothing else where one is missing, though it may be there, misspelt."""
        needed = [action for action in self._actions if action.required]
        valued = [a for a in self._actions if a.option_strings and a.nargs is None]
        flags = itertools.takewhile(lambda word: word != "--", arguments)
        if {"-h", "--help", "--help_all"} & set(flags):
            # Prints the help, whose usage line tells what is required: so before that is switched off.
            super().parse_args(arguments)
        for action in needed:
            action.required = False
        for action in valued:
            action.nargs, action.const = "?", NOTHING
        try:
            options, unknown = self.parse_known_args(arguments)
        finally:
            for action in needed:
                action.required = True
            for action in valued:
                action.nargs, action.const = None, None
        problems, of_flag = [], False
        for word in unknown:
            if word.startswith("-") and len(word) > 1:
                problems.append(self._unknown_flag(word.split("=")[0]))
            elif not of_flag:
                hint = self.hints.get(word, f"see {self.prog} --help")
                problems.append(f"{word}: does not belong to any flag; {hint}")
            of_flag = word.startswith("-") and "=" not in word
        bare = [action for action in valued if self._is_bare(getattr(options, action.dest))]
        for action in bare:
            problems.append(f"{action.option_strings[0]}: needs a value; see {self.prog} --help")
            setattr(options, action.dest, None)
        problems += self._check_values(options)
        for action in needed:
            if action not in bare and getattr(options, action.dest) in (None, []):
                name = [*action.option_strings, action.metavar or action.dest][0]
                problems.append(f"{name}: is required; see {self.prog} --help")
        return options, problems

    @staticmethod
    def _is_bare(value: Any) -> bool:
        return value is NOTHING or (isinstance(value, list) and NOTHING in value)

    def _check_values(self, options: argparse.Namespace) -> Iterator[str]:
        """Turns texts into values, and yields what is wrong with those that are none."""
        for name, check in self.checks.items():
            text = getattr(options, name)
            if isinstance(text, str):
                try:
                    setattr(options, name, check(text))
                except BadValue as error:
                    setattr(options, name, None)
                    yield f"--{name} {error}"

    def _unknown_flag(self, flag: str) -> str:
        close = difflib.get_close_matches(flag, [*self._option_string_actions, *self.hints], n=1)
        hint = f"did you mean {close[0]}?" if close else f"see {self.prog} --help"
        if close:
            hint = self.hints.get(close[0], hint)
        return f"{flag}: unknown flag; {hint}"

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def setting_help(text: str, default: str, short: bool = True) -> str:
    """What `--help` says of a setting: its first statement, or all of it, and its default."""
    said = " ".join(text.split())
    if short:
        said = _END.split(said)[0].rstrip(".")
    return f"{said} (default {default})".replace("%", "%%")


def whole_number(least: int) -> Check:
    """For `checks`: a whole number of at least `least`."""

    def check(text: str) -> int:
        number = convert(text, int)
        if number < least:
            raise BadValue(text, f"must be at least {least}")
        return number

    return check


def one_of(*words: str) -> Check:
    """For `checks`: one of some words."""

    def check(text: str) -> str:
        if text not in words:
            raise BadValue(text, f"must be one of {', '.join(words)}")
        return text

    return check
