"""Text of flags and files -> values of a setting's type, and back."""

from __future__ import annotations

import math
import os
from numbers import Number, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from vtfast.utils.text import shorten

BOOL_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
LARGEST = 2**32 - 1
"""Of a whole number: seeds go up to here, and nothing that is counted comes near it."""


LONGEST_SHOWN = 80
"""Characters of a value that a message quotes."""


class BadValue(ValueError):
    """A value that a setting cannot take; its text is the value and what is wrong with it."""

    def __init__(self, value: Any, problem: str) -> None:
        super().__init__(f"{format_value(value)}: {problem}")


def format_value(value: Any) -> str:
    """A value for a message: on one line, shortened."""
    if isinstance(value, bytes) or not isinstance(value, str | Number | os.PathLike | None):
        return f"({type(value).__name__})"
    try:
        text = str(value)
    except ValueError:  # Python writes out no integer of more than some thousand digits
        return "(a number of thousands of digits)"
    if text == "" or not text.isprintable():
        text = repr(text)
    return shorten(text, LONGEST_SHOWN)


def parse_value(value: Any, hint: Any) -> Any:
    """`value` as the type `hint`: bool, int, float, str, a Literal of words, a list of these, or one of them or None.
    Text is read as on the command line: "none", "true", "a,b". Raises BadValue."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        return parse_value(value, next(part for part in arguments if part is not NoneType))
    if origin is list:
        return _list(value, arguments[0])
    if origin is Literal:
        return _str(value)
    return {bool: _bool, int: _int, float: _float, str: _str}[hint](value)


def to_flag(value: Any) -> str:
    """A field's value as the command line writes it: `parse_value` reads it back."""
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(map(to_flag, value))
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def _list(value: Any, hint: type) -> list:
    if value is None or (isinstance(value, str) and value.lower() == "none"):
        return []
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise BadValue(value, "must be a list, such as a,b")
    if any(isinstance(item, list | tuple | dict | set) for item in items):
        raise BadValue(value, "must be a flat list, such as a,b")
    return [parse_value(item, hint) for item in items if item != ""]


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = format_value(value).lower()
    if word not in BOOL_WORDS:
        raise BadValue(value, "must be true or false")
    return BOOL_WORDS[word]


def _int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, str | Real):
        raise BadValue(value, "must be a whole number")
    try:
        number: Any = int(value) if isinstance(value, str) else value
    except ValueError:  # no digits, or thousands of them
        number = _float_or_nan(value)
    if not isinstance(number, int) and hasattr(number, "__index__"):  # NumPy's
        number = number.__index__()
    if not isinstance(number, int):
        whole = math.isfinite(number) and number == int(number) and abs(number) <= LARGEST
        raise BadValue(value, "must be a whole number" + (f"; write {int(number)}" if whole else ""))
    if abs(number) > LARGEST:
        raise BadValue(value, f"a whole number of at most {LARGEST}")
    return int(number)


def _float(value: Any) -> float:
    is_number = isinstance(value, str | Real) and not isinstance(value, bool)
    number = _float_or_nan(value) if is_number else math.nan
    if not math.isfinite(number):
        raise BadValue(value, "must be a finite number")
    return number


def _float_or_nan(value: Any) -> float:
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def _str(value: Any) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, bool) or not isinstance(value, str | Real):
        raise BadValue(value, "must be text")
    text = format_value(value) if isinstance(value, Real) else str(value)
    if not text.strip():
        raise BadValue(value, "must not be empty; omit the setting to use its default")
    if "\0" in text:
        raise BadValue(value, "must be text without null characters")
    return text
