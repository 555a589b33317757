"""Recipes and flags -> settings."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints, overload

from vtfast.config.problems import SettingsError, nearest, shown
from vtfast.config.runs import Config, RunConfig, SFTConfig
from vtfast.config.values import BadValue, convert, written
from vtfast.config.yaml_file import Given, read_settings_file
from vtfast.utils.errors import UserError

RECIPES = Path(__file__).parent / "recipes"
Kind = TypeVar("Kind", Config, SFTConfig)


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


def field_sections(kind: type[RunConfig] = Config) -> dict[type, tuple[str, ...]]:
    """The sections that `kind` is put together from, in order, and the names of the fields of each."""
    found: dict[type, tuple[str, ...]] = {}
    seen: set[str] = set()
    for section in reversed(kind.__mro__):
        if is_dataclass(section) and section is not kind:
            found[section] = tuple(name for name in section.__annotations__ if name not in seen)
            seen.update(found[section])
    return found


def field_defaults(kind: type[RunConfig] = Config) -> dict[str, str]:
    """What each setting is where neither a recipe nor a flag says, as a flag would say it."""
    return {
        entry.name: written(entry.default if entry.default_factory is MISSING else entry.default_factory())
        for entry in fields(kind)
    }


def recipe_names(kind: type[RunConfig] = Config) -> list[str]:
    """Recipes of the runs that `kind` describes."""
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    return [name for name in names if name.endswith("-sft") == (kind is SFTConfig)]


@overload
def load_config(
    recipe: str | None = None, file: str | Path | None = None, overrides: Mapping[str, Any] | None = None
) -> Config: ...
@overload
def load_config(
    recipe: str | None = None,
    file: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    kind: type[Kind],
) -> Kind: ...
def load_config(
    recipe: str | None = None,
    file: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    kind: type[Any] = Config,
) -> RunConfig:
    """Settings of `kind`: a recipe of this package (the embedded default where None), or a YAML `file` instead of it,
    with `overrides` (flags, as text or values) on top.

    Raises SettingsError, a UserError that names at once everything that is wrong: an unknown recipe, an unreadable
    file, unknown keys (each with the nearest valid one), values of the wrong type, impossible values and combinations.
    """
    problems: list[str] = []
    flags = {str(key): Given(value) for key, value in (overrides or {}).items()}
    recipe = recipe or kind.recipe
    below: dict[str, Given] | None = None
    if file is not None:
        name = Path(file).stem
        below = _read_recipe(Path(file), kind, problems)
    elif recipe in recipe_names(kind):
        name = recipe
        below = _read_recipe(RECIPES / f"{recipe}.yaml", kind, problems)
    else:
        problems.append(f"--recipe {shown(recipe)}: unknown{nearest(recipe, recipe_names(kind))}")
    given = flags if below is None else {"recipe": Given(name), **below, **flags}
    config = _settings(given, kind, problems, whole=below is not None)
    if problems or config is None:
        raise SettingsError(problems)
    return config


def _settings(given: Mapping[str, Given], kind: type[RunConfig], problems: list[str], whole: bool) -> RunConfig | None:
    """The settings; None if something is wrong with them, which goes to `problems`.

    `whole`: `given` is all that was said. If it is not, a rule is passed over that looks at anything else: what is
    there in its place is no one's choice."""
    hints = get_type_hints(kind)
    values = {}
    for key, said in given.items():
        if key not in hints:
            # A file's keys have no dashes; a flag's message is that of an unknown flag.
            dashes = "" if said.where else "--"
            close = nearest(key, list(hints), dashes)
            problems.append(f"{said.where}{dashes}{shown(key)}: unknown{close}")
            continue
        try:
            values[key] = convert(said.value, hints[key])
        except BadValue as error:
            problems.append(f"{said.where}--{key} {error}")
    refused = given.keys() - values.keys()
    try:
        return kind(**values)
    except SettingsError as error:
        for problem in error.problems:
            about = [name for name in re.findall(r"--(\w+)", problem) if name in hints]
            if refused.isdisjoint(about) and (whole or given.keys() >= set(about)):
                where = next((given[name].where for name in about if name in given), "")
                problems.append(where + problem)
    return None


def _read_recipe(
    path: Path, kind: type[RunConfig], problems: list[str], above: tuple[Path, ...] = ()
) -> dict[str, Given] | None:
    """The settings in a file, on top of those of the shipped recipe that its `base:` names, if it names one. None if
    they cannot be had."""
    try:
        values = read_settings_file(path, problems)
    except UserError as error:
        problems.append(str(error))
        return None
    if "base" not in values:
        return values
    base, names = values.pop("base").value, recipe_names(kind)
    below = RECIPES / f"{base}.yaml"
    if base not in names:
        problems.append(f"{path}: base: {shown(base)}: unknown{nearest(str(base), names)}")
        return None
    if below in (path, *above):
        problems.append(f"{path}: base: {base}: leads back to itself")
        return None
    lower = _read_recipe(below, kind, problems, (path, *above))
    return None if lower is None else {**lower, **values}
