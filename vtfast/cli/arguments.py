"""A command-line parser that names everything that is wrong at once, in our words. Built on argparse."""

from __future__ import annotations

import argparse
import difflib
import itertools
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from vtfast.config.problems import SettingsError
from vtfast.config.values import BadValue, parse_value
from vtfast.utils.did_you_mean import question
from vtfast.utils.errors import UserError

Check = Callable[[str], Any]
"""The text behind a flag -> its value. Raises BadValue."""
FIRST_STATEMENT_END = re.compile(r"(?<=\w\w[.]) +(?=[A-Z`])|; (?!none|false|auto|0|`)")
"""End of the first statement in a setting's help: a full stop, or a semicolon that no value's meaning follows."""
NO_VALUE = object()
"""Stands for the value of a flag that was given without one."""


class WholeWords(argparse.HelpFormatter):
    """Breaks lines between words only, so that a recipe's name can be copied in one piece."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        words = " ".join(text.split())
        return textwrap.wrap(words, width, break_on_hyphens=False, break_long_words=False)


class Parser(argparse.ArgumentParser):
    """argparse that raises UserError instead of exiting, names the nearest valid flag and accepts no abbreviations."""

    def __init__(
        self, *, hints: Mapping[str, str] | None = None, checks: Mapping[str, Check] | None = None, **settings: Any
    ) -> None:
        """`hints`: what to say about words and flags that people try and this parser lacks. `checks`: by option name;
        argparse's own `type` and `choices` would stop at the first bad value."""
        super().__init__(allow_abbrev=False, **{"formatter_class": WholeWords} | settings)
        self.hints = hints or {}
        self.checks = checks or {}

    def parse(
        self, arguments: Sequence[str], find_problems: Callable[[argparse.Namespace], Iterable[str]] = lambda _: ()
    ) -> argparse.Namespace:
        """Raises SettingsError, which names everything that is wrong, with what `find_problems` finds besides."""
        options, problems = self.parse_known(arguments)
        problems += find_problems(options)
        if problems:
            raise SettingsError(problems)
        return options

    def parse_known(self, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Returns the options and the problems: a line for each unknown flag, stray word, missing value, bad value (the
        option is None then) and missing argument."""
        required = [action for action in self._actions if action.required]
        with_value = [action for action in self._actions if action.option_strings and action.nargs is None]
        flags = itertools.takewhile(lambda word: word != "--", arguments)
        if {"-h", "--help", "--help_all"} & set(flags):
            super().parse_args(arguments)  # prints the help, whose usage line shows what is required, and exits
        # argparse stops at the first missing argument or value. Both are made optional for this one parse.
        for action in required:
            action.required = False
        for action in with_value:
            action.nargs, action.const = "?", NO_VALUE
        try:
            options, unknown = self.parse_known_args(arguments)
        finally:
            for action in required:
                action.required = True
            for action in with_value:
                action.nargs, action.const = None, None
        problems = list(self._unknown(unknown))
        bare = [action for action in with_value if _lacks_value(getattr(options, action.dest))]
        for action in bare:
            problems.append(f"{action.option_strings[0]}: needs a value; see {self.prog} --help")
            setattr(options, action.dest, None)
        problems += self._check_values(options)
        for action in required:
            if action not in bare and getattr(options, action.dest) in (None, []):
                name = [*action.option_strings, action.metavar or action.dest][0]
                problems.append(f"{name}: is required; see {self.prog} --help")
        return options, problems

    def _unknown(self, words: Sequence[str]) -> Iterator[str]:
        """A problem for each unknown flag and each stray word; a word behind an unknown flag counts as its value."""
        behind_flag = False
        for word in words:
            if word.startswith("-") and len(word) > 1:
                yield self._unknown_flag(word.split("=")[0])
            elif not behind_flag:
                yield f"{word}: does not belong to any flag; {self.hints.get(word, f'see {self.prog} --help')}"
            behind_flag = word.startswith("-") and "=" not in word

    def _unknown_flag(self, flag: str) -> str:
        close = difflib.get_close_matches(flag, [*self._option_string_actions, *self.hints], n=1)
        if close and close[0] in self.hints:
            return f"{flag}: unknown flag; {self.hints[close[0]]}"
        return f"{flag}: unknown flag; {question(close[0] if close else None, f'see {self.prog} --help')}"

    def _check_values(self, options: argparse.Namespace) -> Iterator[str]:
        """Replaces the texts in `options` by values; a problem for each text that is not a valid value."""
        for name, check in self.checks.items():
            text = getattr(options, name)
            if isinstance(text, str):
                try:
                    setattr(options, name, check(text))
                except BadValue as error:
                    setattr(options, name, None)
                    yield f"--{name} {error}"

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _lacks_value(value: Any) -> bool:
    return value is NO_VALUE or (isinstance(value, list) and NO_VALUE in value)


def setting_help(text: str, default: str, short: bool = True) -> str:
    """The help of a setting, or its first statement alone, with its default."""
    text = " ".join(text.split())
    if short:
        text = FIRST_STATEMENT_END.split(text)[0].rstrip(".")
    return f"{text} (default {default})".replace("%", "%%")


def whole_number(least: int) -> Check:
    """For `checks`: a whole number of at least `least`."""

    def check(text: str) -> int:
        number = parse_value(text, int)
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
