"""YAML files that others wrote: plain values alone, with the line of each name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from vtfast.utils.errors import UserError
from vtfast.utils.files import read_text

LARGEST = 1 << 16
"""Bytes of a file. Settings fill a page, and PyYAML takes minutes for megabytes."""
DEEPEST = 16
"""Levels of nesting. PyYAML takes a time quadratic in the depth."""
NULL, TEXT = "tag:yaml.org,2002:null", "tag:yaml.org,2002:str"


@dataclass(frozen=True)
class Entry:
    """A value of the top level."""

    value: Any
    line: int


def read_yaml(path: Path) -> dict[str, Any]:
    """The values of a YAML mapping. Raises UserError for a file that cannot be read, is no mapping of texts to values,
    or holds more than plain values: aliases, which would let a page of text stand for gigabytes, tags, or the same name
    twice."""
    entries = _read(path, lambda loader, node: loader.construct_object(node, deep=True))
    return {name: entry.value for name, entry in entries.items()}


def read_yaml_texts(path: Path) -> dict[str, Entry]:
    """As `read_yaml`, but with values as they are written: text, None, or lists and mappings of these."""
    return _read(path, lambda loader, node: _text(node))


def parse_yaml_value(text: str) -> Any:
    """One word as YAML reads it, if that is a plain value; else the text itself."""
    try:
        return _PlainLoader(text).get_single_data()
    except (yaml.YAMLError, ValueError, OverflowError):  # a date that does not exist, 5,000 digits
        return text


def _read(path: Path, convert: Callable[[_PlainLoader, yaml.Node], Any]) -> dict[str, Entry]:
    text = read_text(path, LARGEST)
    try:
        loader = _PlainLoader(text)
        # `check_node` also skips the start of the stream.
        root = loader.get_node() if loader.check_node() else None
        if not isinstance(root, yaml.MappingNode):
            loader.refuse("must be a mapping of settings to values, such as `max_steps: 3`", root)
        if loader.check_node():
            loader.refuse("several documents (a line of ---); keep one", loader.get_node())
        entries = {}
        for key, node in root.value:
            if key.tag != TEXT:
                loader.refuse("a name must be text", key)
            entries[key.value] = Entry(convert(loader, node), key.start_mark.line + 1)
        return entries
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # a date that does not exist, 5,000 digits
        problem, line = " ".join(str(error).split()), ""
        if isinstance(error, yaml.MarkedYAMLError):  # its own text quotes the file, which may be a link to another
            problem, mark = str(error.problem), error.problem_mark or error.context_mark
            line = f"line {mark.line + 1}: " if mark else ""
        hint = "; indent with spaces" if "'\\t'" in problem else ""
        raise UserError(f"{path}: not valid YAML ({line}{problem}{hint})") from None


def _text(node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return {key.value: _text(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_text(item) for item in node.value]
    return None if node.tag == NULL else node.value


class _PlainLoader(yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            self.refuse(f"*{event.anchor} is an alias; write the value itself", event)
        if event.tag is not None:
            self.refuse(f"{event.tag} is a tag; write the value alone", event)
        self.depth += 1
        if self.depth > DEEPEST:
            self.refuse("nested too deeply", event)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.refuse("a name must be text", key)
            if key.value in lines:
                self.refuse(f"{key.value}: is set in line {lines[key.value]} already; keep one", key)
            lines[key.value] = key.start_mark.line + 1
        return node

    def refuse(self, problem: str, place: Any) -> NoReturn:
        """Raises ComposerError; `place`: an event, a node or None."""
        raise yaml.composer.ComposerError(None, None, problem, place and place.start_mark)
