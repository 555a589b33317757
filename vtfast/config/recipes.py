"""Recipes and flags -> settings."""

from __future__ import annotations

import ast
import difflib
import inspect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from vtfast.config.runs import Config, RunConfig, SFTConfig
from vtfast.errors import UserError
from vtfast.files import read_mapping

RECIPES = Path(__file__).parent.parent / "recipes"


def field_help(kind: type[RunConfig] = Config) -> dict[str, str]:
    """The docstring under each field of `kind`, by name."""
    return {
        entry.target.id: inspect.cleandoc(text.value.value)
        for section in reversed(kind.__mro__[:-1])
        for entry, text in itertools.pairwise(ast.parse(inspect.getsource(section)).body[0].body)
        if isinstance(entry, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def field_names(kind: type[RunConfig] = Config) -> tuple[str, ...]:
    return tuple(entry.name for entry in fields(kind))


def recipe_names(kind: type[RunConfig] = Config) -> list[str]:
    """Recipes of the runs that `kind` describes."""
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    return [name for name in names if name.endswith("-sft") == (kind is SFTConfig)]


def load_config(
    recipe: str | None = None,
    file: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    kind: type[RunConfig] = Config,
) -> RunConfig:
    """Settings of `kind`: a recipe of this package (the embedded default where None), or a YAML `file` instead of it,
    with `overrides` (flags, as text or values) on top.

    Raises UserError for an unknown recipe, an unreadable file, an unknown key (naming the nearest valid one) or a
    value of the wrong type.
    """
    if file is None:
        recipe = recipe or kind.recipe
        known = recipe_names(kind)
        if recipe not in known:
            raise UserError(f"--recipe {recipe}: unknown{_nearest(recipe, known)}")
        file, name = RECIPES / f"{recipe}.yaml", recipe
    else:
        name = Path(file).stem
    values = {"recipe": name, **_read_recipe(Path(file), kind), **(overrides or {})}
    hints = get_type_hints(kind)
    unknown = [key for key in values if key not in hints]
    if unknown:
        where = "flag --" if overrides and unknown[0] in overrides else f"{file}: key "
        raise UserError(f"{where}{unknown[0]}: unknown{_nearest(unknown[0], list(hints))}")
    return kind(**{key: _convert(key, value, hints[key]) for key, value in values.items()})


def _read_recipe(path: Path, kind: type[RunConfig], above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The settings in a file, on top of those of the shipped recipe that its `base:` names, if it names one."""
    values = _read_yaml(path)
    base = values.pop("base", None)
    if base is None:
        return values
    if base not in recipe_names(kind):
        raise UserError(f"{path}: base: {base}: unknown{_nearest(str(base), recipe_names(kind))}")
    below = RECIPES / f"{base}.yaml"
    if below in (path, *above):
        raise UserError(f"{path}: base: {base}: leads back to itself")
    return {**_read_recipe(below, kind, (path, *above)), **values}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        return read_mapping(path)
    except UserError as error:
        raise UserError(f"--config {error}") from None


def _nearest(name: str, valid: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; valid are {', '.join(sorted(valid))}"


def _convert(name: str, value: Any, hint: Any) -> Any:
    """`value` as the field's type. Text is read as the command line means it: "none", "true", "a,b"."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        return _convert(name, value, next(part for part in arguments if part is not NoneType))
    if origin is list:
        if value is None or (
            isinstance(value, str) and value.lower() == "none" and name == "freeze"
        ):
            return []
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise UserError(f"--{name} {value}: must be a list, such as a,b")
        return [_convert(name, item, arguments[0]) for item in items if item != ""]
    if hint is bool:
        known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if str(value).lower() not in known:
            raise UserError(f"--{name} {value}: must be true or false")
        return known[str(value).lower()]
    try:
        number = hint(value)
        whole = hint is not int or isinstance(value, str) or value == number
        if isinstance(value, bool) or not whole or (hint is float and not math.isfinite(number)):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"--{name} {value}: must be {_TYPE_NAMES[hint]}") from None
    if hint is str and "\0" in number:
        raise UserError(f"--{name}: holds a NUL character, which no name or path has")
    return number


_TYPE_NAMES = {int: "a whole number", float: "a finite number", str: "text"}
