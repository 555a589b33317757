"""argparse, with this project's manners."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence

from vtfast.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse with our exit path: a UserError that names the nearest valid flag, and no abbreviations."""

    def __init__(self, **settings) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def parse_args(self, arguments: Sequence[str]) -> argparse.Namespace:
        options, unknown = self.parse_known_args(arguments)
        if unknown:
            flag = unknown[0].split("=")[0]
            close = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            hint = f"did you mean {close[0]}?" if close else f"see {self.prog} --help"
            raise UserError(f"{flag}: unknown flag; {hint}")
        return options

    def error(self, message: str) -> None:
        raise UserError(f"{message}; see {self.prog} --help")
