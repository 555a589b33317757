"""Damage to a checkpoint, as by a disk, a crash of the machine or a user."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

CHECKSUMS = "resume/checksums.json"


def truncate(folder: Path, rng: random.Random) -> str:
    file = _some_file(folder, rng)
    length = rng.randrange(1, file.stat().st_size)
    with file.open("r+b") as handle:
        handle.truncate(length)
    return f"{file.name} cut to {length} bytes"


def empty(folder: Path, rng: random.Random) -> str:
    file = _some_file(folder, rng)
    file.write_bytes(b"")
    return f"{file.name} emptied"


def flip_bit(folder: Path, rng: random.Random) -> str:
    file = _some_file(folder, rng)
    place, bit = rng.randrange(file.stat().st_size), rng.randrange(8)
    with file.open("r+b") as handle:
        handle.seek(place)
        byte = handle.read(1)[0]
        handle.seek(place)
        handle.write(bytes([byte ^ 1 << bit]))
    return f"{file.name}: bit {bit} of byte {place} flipped"


def remove(folder: Path, rng: random.Random) -> str:
    file = _some_file(folder, rng)
    file.unlink()
    return f"{file.name} removed"


def remove_checksums(folder: Path, rng: random.Random) -> str:
    (folder / CHECKSUMS).unlink()
    return f"{CHECKSUMS} removed"


def undo_rename(folder: Path, rng: random.Random) -> str:
    folder.rename(folder.with_name(f".{folder.name}.partial"))
    return "renaming undone"


DAMAGES: dict[str, Callable[[Path, random.Random], str]] = {
    "truncated file": truncate,
    "empty file": empty,
    "flipped bit": flip_bit,
    "missing file": remove,
    "missing checksums": remove_checksums,
    "undone rename": undo_rename,
}
"""(folder of a checkpoint, rng) -> a sentence on what was done."""


def _some_file(folder: Path, rng: random.Random) -> Path:
    """Large and small files alike, so that a bit of the optimizer is as likely as one of the tokenizer."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 1]
    return rng.choice(sorted(files))
