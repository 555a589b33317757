"""Files at paths that a user chose: read up to a limit, written atomically, never outside their folder."""

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

from vtfast.utils.did_you_mean import did_you_mean
from vtfast.utils.errors import UserError
from vtfast.utils.text import shorten

LARGEST_JSON = 50_000_000
"""Bytes of a JSON file. The largest is a tokenizer's, with about ten million."""
LARGEST_TEXT = 1_000_000
"""Bytes of a prompt template or another text that fills a page."""


def expand(path: str | Path) -> Path:
    """A user's path with `~` resolved. It need not exist. Raises UserError for a path that cannot exist."""
    try:
        expanded = Path(path).expanduser()
        os.stat(expanded)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, RuntimeError) as error:  # too long, a loop of links; a NUL byte; no such user
        raise UserError(f"{shorten(path)}: cannot be used ({getattr(error, 'strerror', None) or error})") from None
    return expanded


def step_of(name: str) -> int | None:
    """N of a checkpoint's or an evaluation's folder `step-N`; None for another name."""
    match = re.fullmatch(r"step-(\d+)", name)
    return int(match[1]) if match else None


@contextlib.contextmanager
def _names_file(path: Path) -> Iterator[None]:
    """Turns the errors of reading a file into a UserError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {did_you_mean(path, 'check the path')}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def read_text(path: Path, longest: int = LARGEST_TEXT) -> str:
    """A text file of at most `longest` bytes. Raises UserError for any other; a pipe would block forever."""
    with _names_file(path):
        if path.exists() and not path.is_file():
            raise ValueError("is a folder" if path.is_dir() else "not a regular file")
        if path.stat().st_size > longest:
            raise ValueError(f"longer than {longest} bytes")
        return path.read_bytes().decode().replace("\r\n", "\n")


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A temporary file that replaces `path` when the block ends without an error. A reader, or a crash, finds the old
    content or the new; a link at `path` is replaced and not followed."""
    # A random name: two hosts may write the same file of a shared disk, and process ids repeat across containers.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:  # "x" follows no link
            yield file
        flush(partial)
        partial.replace(path)
        flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def flush(path: Path) -> None:
    """Write a file, or the names in a folder, through to the disk (fsync)."""
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
    """Raises UserError for a path that a link leads out of `root`: a run folder from somebody else may hold links to
    any file that the user can write."""
    for path in paths:
        if not path.resolve().is_relative_to(root.resolve()):
            raise UserError(
                f"{path}: leads to {path.resolve()}, outside of {root}. Remove the link, or choose another --output_dir"
            )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping. Raises UserError for anything else."""
    text = read_text(file, LARGEST_JSON)
    with _names_file(file):
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"must be a mapping, not {type(values).__name__}")
    return values
