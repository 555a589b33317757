"""Files and paths that others chose: read with a limit, written whole or not at all, never outside of their folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from vtfast.utils.errors import UserError

LARGEST_JSON = 50_000_000
"""Bytes of a JSON file: a tokenizer's is the largest, with some ten million."""
LARGEST_TEXT = 1_000_000
"""Bytes of settings or of a template, which are a page: a YAML parser in Python takes minutes for more."""


def expand(path: str | Path) -> Path:
    """A path that a user gave, `~` resolved. It need not exist. Raises UserError for one that cannot."""
    try:
        expanded = Path(path).expanduser()
        os.stat(expanded)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # too long, a loop of links, no permission to look
        raise UserError(f"{shortened(path)}: cannot be used ({error.strerror})") from None
    except (ValueError, RuntimeError) as error:  # a NUL byte; no such user
        raise UserError(f"{shortened(path)}: cannot be used ({error})") from None
    return expanded


def shortened(text: object, longest: int = 200) -> str:
    """Text for a message, without its middle where it is too long to be what it should be."""
    text = str(text)
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]}...{text[-half:]}"


def step_of(name: str) -> int | None:
    """N of a folder called `step-N`, a checkpoint or an evaluation of one; None for another name."""
    found = re.fullmatch(r"step-(\d+)", name)
    return int(found[1]) if found else None


def read_text(path: Path) -> str:
    """A small text file. Raises UserError where it is no regular file (a pipe would wait for ever), larger than
    LARGEST_TEXT, or no UTF-8."""
    if not path.is_file():
        reason = "not a regular file" if path.exists() else "no such file"
        raise UserError(f"{path}: cannot be read ({reason})")
    try:
        if path.stat().st_size > LARGEST_TEXT:
            raise UserError(f"{path}: {path.stat().st_size} bytes, more than {LARGEST_TEXT}")
        return path.read_bytes().decode().replace("\r\n", "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read (not UTF-8 text: {error.reason})") from None


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file that takes `path`'s place when the block has ended without an error. A reader, or a machine that goes
    down, finds the old content or the new; a link in its place is replaced and not followed."""
    # Two hosts may write the same file of a shared disk, and processes of containers have the same numbers.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:  # "x" follows no link
            yield file
        flush(partial)
        partial.replace(path)
        flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    with written_whole(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(value, indent=2) + "\n")


def flush(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def check_inside(root: Path, *paths: Path) -> None:
    """Raises UserError for a path that leads out of `root` by a link: a run folder that came from elsewhere may hold
    links to anything that its reader can write."""
    for path in paths:
        if not path.resolve().is_relative_to(root.resolve()):
            raise UserError(
                f"{path}: leads to {path.resolve()}, outside of {root}. Remove the link, or choose another --output_dir"
            )


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML file of settings. Plain values alone: no tags that make objects, and no aliases, which would let a page
    of text stand for gigabytes.

    Raises:
        UserError: not a regular file, not readable, or not a mapping with texts for names.
    """
    text = read_text(path)
    try:
        values = _PlainLoader(text).get_single_data()
    except yaml.MarkedYAMLError as error:  # its own text quotes the file, which may be a link to another
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise UserError(f"{path}: not valid YAML ({where}{error.problem})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    except (ValueError, TypeError, OverflowError) as error:  # a date that is none, 5,000 digits
        raise UserError(f"{path}: not valid YAML ({error})") from None
    except RecursionError:
        raise UserError(f"{path}: not valid YAML (too deeply nested)") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be a mapping of settings to values")
    for key in values:
        if not isinstance(key, str):
            raise UserError(f"{path}: the name {key!r} is no text")
    return values


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping. Raises UserError for anything else."""
    try:
        if file.stat().st_size > LARGEST_JSON:
            raise ValueError(f"{file.stat().st_size} bytes")
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{file}: cannot be read ({reason})") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: a mapping is wanted, not {type(values).__name__}")
    return values


class _PlainLoader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"alias *{event.anchor}: write the value out", event.start_mark
            )
        return super().compose_node(parent, index)
