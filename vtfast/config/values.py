"""A value as it was written -> the type of its field, and back."""

from __future__ import annotations

import math
import os
from numbers import Real
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from vtfast.config.problems import shown

WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
LARGEST = 2**32 - 1
"""Of a whole number: seeds go up to here, and nothing that is counted comes near it."""


class BadValue(ValueError):
    """Not of the field's type. `str()` of it is the value and what it must be."""

    def __init__(self, value: Any, wanted: str) -> None:
        super().__init__(f"{shown(value)}: must be {wanted}")


def convert(value: Any, hint: Any) -> Any:
    """`value` as a field's type `hint`. Text is read as the command line means it: "none", "true", "a,b".

    Raises BadValue.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        return convert(value, next(part for part in arguments if part is not NoneType))
    if origin is list:
        return _list(value, arguments[0])
    return {bool: _bool, int: _int, float: _float, str: _str}[hint](value)


def written(value: Any) -> str:
    """A field's value as the command line writes it: `convert` reads it back."""
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(map(written, value))
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def _list(value: Any, hint: type) -> list:
    if value is None or (isinstance(value, str) and value.lower() == "none"):
        return []
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise BadValue(value, "a list, such as a,b")
    if any(isinstance(item, list | tuple | dict | set) for item in items):
        raise BadValue(value, "a flat list, such as a,b")
    return [convert(item, hint) for item in items if item != ""]


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = shown(value).lower()
    if word not in WORDS:
        raise BadValue(value, "true or false")
    return WORDS[word]


def _int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, str | Real):
        raise BadValue(value, "a whole number")
    try:
        number: Any = int(value) if isinstance(value, str) else value
    except ValueError:  # no digits, or thousands of them
        number = _float_or_nan(value)
    if not isinstance(number, int) and hasattr(number, "__index__"):  # NumPy's
        number = number.__index__()
    if not isinstance(number, int):
        whole = math.isfinite(number) and number == int(number) and abs(number) <= LARGEST
        raise BadValue(value, "a whole number" + (f"; write {int(number)}" if whole else ""))
    if abs(number) > LARGEST:
        raise BadValue(value, f"a whole number of at most {LARGEST}")
    return int(number)


def _float(value: Any) -> float:
    is_number = isinstance(value, str | Real) and not isinstance(value, bool)
    number = _float_or_nan(value) if is_number else math.nan
    if not math.isfinite(number):
        raise BadValue(value, "a finite number")
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
        raise BadValue(value, "text")
    text = shown(value) if isinstance(value, Real) else str(value)
    if not text.strip():
        raise BadValue(value, "text that says something; leave the setting out for its default")
    if "\0" in text:
        raise BadValue(value, "text without null characters")
    return text
