"""Settings files. YAML, and of YAML what settings need: a mapping of names to single values or flat lists.

The file is read as a stream of events and nothing is built from it, so that no file, however nested or aliased, can
cost more than its own length. Values stay text, which `values.convert` reads as it reads a flag.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
)

from vtfast.utils.errors import UserError
from vtfast.utils.suggestions import did_you_mean

MOST_BYTES = 1 << 16
DEEPEST = 16
NOTHING = ("", "~", "null", "Null", "NULL")


@dataclass(frozen=True)
class Given:
    """A value, and where it was said."""

    value: Any
    where: str = ""
    """In front of what is said about it: `mine.yaml:7: `, or nothing for a flag."""


def read_settings_file(path: Path, problems: list[str]) -> dict[str, Given]:
    """Settings by name. What is wrong with single ones goes to `problems`, and they are left out.

    Raises UserError for what is no settings file at all.
    """
    flag = f"--config {path}"
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # a pipe would wait for ever
            raise UserError(f"{flag}: is no regular file; name a YAML file")
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise UserError(f"{flag}: longer than {MOST_BYTES} bytes, so not a file of settings")
        text = content.decode("utf-8-sig")
    except IsADirectoryError:
        raise UserError(f"{flag}: is a folder; name a YAML file in it") from None
    except FileNotFoundError:
        wanted = "name a YAML file of settings"
        raise UserError(f"{flag}: no such file; {did_you_mean(path, wanted)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{flag}: cannot be read (byte {error.start} is not UTF-8); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{flag}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # a null character in the path
        raise UserError(f"--config {str(path)!r}: cannot be read ({error})") from None
    try:
        return _settings(yaml.parse(text, Loader=yaml.SafeLoader), path, problems)
    except yaml.YAMLError as error:
        raise UserError(f"{flag}: not valid YAML ({_reason(error)})") from None


def _settings(events: Iterator[Event], path: Path, problems: list[str]) -> dict[str, Given]:
    roots = (event for event in events if isinstance(event, NodeEvent))
    if not isinstance(next(roots, None), MappingStartEvent):
        raise UserError(f"--config {path}: must be a mapping of settings to values, such as `max_steps: 3`")
    found: dict[str, Given] = {}
    lines: dict[str, int] = {}
    while not isinstance(event := next(events), MappingEndEvent):
        line = event.start_mark.line + 1
        where = f"{path}:{line}: "
        name, no_name = _value(event, events)
        value, problem = _value(next(events), events)
        if no_name or not isinstance(name, str):
            problems.append(f"{where}a setting's name must be text")
        elif name in lines:
            problems.append(f"{where}{name}: is set in line {lines[name]} already; keep one")
        elif problem:
            problems.append(f"{where}{name}: {problem}")
        else:
            found[name] = Given(value, where)
        if isinstance(name, str):
            lines.setdefault(name, line)
    if any(isinstance(event, DocumentStartEvent) for event in events):
        raise UserError(f"--config {path}: holds several documents (a line of ---); keep one")
    return found


def _value(event: Event, events: Iterator[Event]) -> tuple[Any, str | None]:
    """What `event` begins -> (text, None or a list of these; what is wrong with it). Takes its events."""
    if isinstance(event, AliasEvent):
        return None, f"*{event.anchor} is an alias; write the value itself"
    problem = None if event.tag is None else f"{event.tag} is a tag; write the value alone"
    if isinstance(event, ScalarEvent):
        return (None if event.style is None and event.value in NOTHING else event.value), problem
    items, depth = [], 1
    if isinstance(event, MappingStartEvent):
        problem = "must be a value or a flat list of values, not a mapping"
    while depth:
        inner = next(events)
        if depth > DEEPEST:  # PyYAML takes a time quadratic in the depth
            raise yaml.YAMLError(f"line {inner.start_mark.line + 1}: nested too deeply")
        depth += isinstance(inner, CollectionStartEvent) - isinstance(inner, CollectionEndEvent)
        if isinstance(inner, ScalarEvent | AliasEvent):
            item, wrong = _value(inner, events)
            items.append(item)
            problem = problem or wrong
        elif isinstance(inner, CollectionStartEvent):
            problem = problem or "must be a value or a flat list of values"
    return items, problem


def _reason(error: yaml.YAMLError) -> str:
    """On one line, with its place."""
    mark = getattr(error, "problem_mark", None)
    text = getattr(error, "problem", None) or str(error).splitlines()[0]
    where = f"line {mark.line + 1}: " if mark else ""
    return where + text + ("; indent with spaces" if "'\\t'" in text else "")
