"""Recipes and flags -> settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

from vtfast.config.problems import SettingsError
from vtfast.config.runs import Config, RunConfig, SFTConfig
from vtfast.config.values import format_value
from vtfast.utils.did_you_mean import nearest
from vtfast.utils.errors import UserError
from vtfast.utils.files import expand
from vtfast.utils.yaml_file import read_yaml_texts

RECIPES = Path(__file__).parent / "recipes"
Kind = TypeVar("Kind", Config, SFTConfig)


@dataclass(frozen=True)
class SourcedValue:
    """A value as a file or a flag gives it."""

    value: Any
    where: str = ""
    """`mine.yaml:7: `, for the start of a message; empty for a flag."""


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
    known_problems: Sequence[str] = (),
) -> Kind: ...
def load_config(
    recipe: str | None = None,
    file: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    kind: type[Any] = Config,
    known_problems: Sequence[str] = (),
) -> RunConfig:
    """Settings of `kind`: a recipe of this package (the embedded default where None), or a YAML `file` instead of it,
    with `overrides` (flags, as text or values) on top. `known_problems`: of the command line, raised with the others.

    Raises SettingsError, a UserError that names at once everything that is wrong: an unknown recipe, an unreadable
    file, unknown keys (each with the nearest valid one), values of the wrong type, impossible values and combinations.
    """
    problems = list(known_problems)
    flags = {format_value(name): SourcedValue(value) for name, value in (overrides or {}).items()}
    recipe = recipe or kind.model_fields["recipe"].default
    base: dict[str, SourcedValue] | None = None
    if file is not None:
        name = Path(file).stem
        base = _read_recipe(file, kind, problems)
    elif recipe in recipe_names(kind):
        name = recipe
        base = _read_recipe(RECIPES / f"{recipe}.yaml", kind, problems)
    else:
        problems.append(f"--recipe {format_value(recipe)}: unknown; {nearest(recipe, recipe_names(kind))}")
    given = flags if base is None else {"recipe": SourcedValue(name), **base, **flags}
    try:
        config = kind(**{name: setting.value for name, setting in given.items()})
    except SettingsError as error:
        for problem in error.details:
            # Without the recipe, a rule would judge defaults that nobody chose.
            if base is not None or given.keys() >= set(problem.fields):
                where = next((given[name].where for name in problem.fields if name in given), "")
                problems.append(where + problem.message)
    if problems:
        raise SettingsError(problems)
    return config


def _read_recipe(path: str | Path, kind: type[RunConfig], problems: list[str]) -> dict[str, SourcedValue] | None:
    """The settings in a file, on top of those of the shipped recipe that its `base:` names, if it names one. None if
    they cannot be read; `problems` says why then."""
    try:
        path = expand(path)
        entries = read_yaml_texts(path)
    except UserError as error:
        problems.append(f"--config {error}")
        return None
    values = {
        format_value(name): SourcedValue(entry.value, f"{path}:{entry.line}: ") for name, entry in entries.items()
    }
    if "base" not in values:
        return values
    base_name, names = str(values.pop("base").value), recipe_names(kind)
    if base_name not in names:
        problems.append(f"{path}: base: {format_value(base_name)}: unknown; {nearest(base_name, names)}")
        return None
    base = _read_recipe(RECIPES / f"{base_name}.yaml", kind, problems)
    return None if base is None else {**base, **values}
