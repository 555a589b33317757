"""Text of flags and files -> values of a setting's type, and back."""

from __future__ import annotations

import math
import operator
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
    text = str(value)
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
    parse, wanted = SCALARS[str if origin is Literal else hint]
    try:
        parsed = parse(None if isinstance(value, bool) and hint is not bool else value)  # Python counts True as 1
    except (ValueError, TypeError, KeyError, OverflowError):
        raise BadValue(value, wanted) from None
    if isinstance(parsed, int) and abs(parsed) > LARGEST:
        raise BadValue(value, f"a whole number of at most {LARGEST}")
    return parsed


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
    if not isinstance(items, list | tuple) or any(isinstance(item, list | tuple | dict | set) for item in items):
        raise BadValue(value, "must be a flat list, such as a,b")
    return [parse_value(item, hint) for item in items if item != ""]


def _bool(value: Any) -> bool:
    return BOOL_WORDS[str(value).lower()]


def _int(value: Any) -> int:
    return int(value) if isinstance(value, str) else operator.index(value)


def _float(value: Any) -> float:
    number = float(value) if isinstance(value, str | Real) else math.nan
    if not math.isfinite(number):
        raise ValueError
    return number


def _str(value: Any) -> str:
    text = str(value)
    if not isinstance(value, str | Real | os.PathLike) or not text.strip() or "\0" in text:
        raise ValueError
    return text


SCALARS = {
    bool: (_bool, "must be true or false"),
    int: (_int, "must be a whole number"),
    float: (_float, "must be a finite number"),
    str: (_str, "must be text, and not empty"),
}
"""Type -> parser, which raises any error for a value of another type, and what a message says then."""
