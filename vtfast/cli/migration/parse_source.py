"""YAML files, shell scripts and launch lines of other trainers -> flat names and values."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vtfast.utils.errors import UserError, user_error
from vtfast.utils.files import read_text
from vtfast.utils.yaml_file import parse_yaml_value, read_yaml

SEPARATORS = ("&&", "||", "|", "&", ";")
"""Between two commands of a line."""
REDIRECTION = re.compile(r"(\d|&)?>{1,2}(?P<where>.*)|<")
PROCESSES = ("num_processes", "nproc_per_node", "nproc-per-node", "num_gpus", "num_accelerators")
"""Launchers' flags for the number of ranks."""


@dataclass
class Source:
    """Settings by name; nested ones have dots in their names, as on EasyR1's command line."""

    values: dict[str, Any] = field(default_factory=dict)
    script: str = ""
    """The script or module that a launch line starts."""
    processes: int | None = None
    unread: list[str] = field(default_factory=list)
    """Words that are no setting, or need a shell variable of the machine they were written for."""


def read(what: str) -> Source:
    """The settings in `what`: the path of a YAML file or a shell script, or a launch line. Raises UserError for a file
    that cannot be read, and for text without settings."""
    path = Path(what)
    if re.search(r"\s--?\w|\s[\w.]+=", what):
        source = _launch(what)
    elif path.suffix in (".yaml", ".yml"):
        source = Source(flatten(read_yaml(path)))
    else:
        source = _launch(read_text(path))
    if not source.values:
        raise UserError(f"{what}: holds no settings of a trainer")
    return source


def flatten(values: Mapping[Any, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{above}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat


def _launch(text: str) -> Source:
    """The last command of a shell script that starts Python: its flags, and its launcher's number of ranks."""
    commands = _commands(text)
    starts = [(words, at) for words in commands if (at := _script_at(words)) is not None]
    if not starts:
        return Source()
    words, at = starts[-1]
    source = Source(script=words[at])
    for name, value in _flags(words[:at], source):
        if name in PROCESSES and str(value).isdigit():
            source.processes = int(value)
    source.unread = []  # a launcher's own words
    source.values = dict(_flags(words[at + 1 :], source))
    for name in PROCESSES:  # `trl grpo` takes its launcher's flags among its own
        if str(source.values.get(name)).isdigit():
            source.processes = int(source.values.pop(name))
    for name in [name for name, value in source.values.items() if "$" in str(value)]:
        source.unread.append(f"{name}: {source.values.pop(name)} (a shell variable)")
    return source


def _commands(text: str) -> list[list[str]]:
    """The commands of a script as words, with its plain variables substituted."""
    variables: dict[str, str] = {}
    commands = []
    for line in re.sub(r"\\\s*\n", " ", text).splitlines():
        with user_error(f"a line cannot be read as shell words: {line[:80]!r}"):
            words = shlex.split(line, comments=True)
        for command in _split_commands(words):
            command = [_substitute(word, variables) for word in command]
            while command and re.fullmatch(r"(export|[A-Za-z_]\w*=.*)", command[0]):
                name, _, value = command.pop(0).partition("=")
                if name != "export":
                    variables[name] = value
            if command:
                commands.append(command)
    return commands


def _split_commands(words: list[str]) -> Iterator[list[str]]:
    """The commands of a line, without their redirections: `2>&1 | tee log` does not belong to the last flag."""
    command: list[str] = []
    rest = iter(words)
    for word in rest:
        if word in SEPARATORS:
            yield command
            command = []
        elif found := REDIRECTION.fullmatch(word):
            if not found["where"]:
                next(rest, None)  # the file
        else:
            command.append(word)
    yield command


def _substitute(word: str, variables: Mapping[str, str]) -> str:
    def known(match: re.Match) -> str:
        return variables.get(match[1] or match[2], match[0])

    return re.sub(r"\$(?:(\w+)|\{(\w+)\})", known, word)


def _script_at(words: list[str]) -> int | None:
    """Index of the script's path, of the module after the last `-m`, or of `trl`'s command."""
    for place, word in enumerate(words):
        if word.split("/")[-1] == "trl" and words[place + 1 : place + 2] == ["grpo"]:
            return place + 1
        if word.endswith(".py") and not word.startswith("-"):
            return place
        if word == "-m" and place + 1 < len(words) and not words[place + 1].startswith("torch."):
            return place + 1
    return None


def _flags(words: list[str], source: Source) -> Iterator[tuple[str, Any]]:
    """`--name value ...`, `--name=value`, `--name` and `name=value` -> (name, value). Several values are a list."""
    place = 0
    while place < len(words):
        word = words[place]
        place += 1
        if word.startswith("--"):
            name, given, value = word[2:].partition("=")
            values = [value] if given else []
            while not given and place < len(words) and not words[place].startswith("--"):
                values.append(words[place])
                place += 1
            values = [_value(text) for text in values]
            yield name, True if not values else values[0] if len(values) == 1 else values
        elif re.match(r"[A-Za-z_][\w.]*=", word):
            name, _, value = word.partition("=")
            yield name, _value(value)
        else:
            source.unread.append(word)


def _value(text: str) -> Any:
    """A word as YAML reads it, if that is a plain value."""
    value = parse_yaml_value(text)
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)  # YAML 1.1 wants a dot in 1e-6
    return value
