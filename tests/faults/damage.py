"""What a disk, a crash of the machine or a careless hand does to a checkpoint."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

CHECKSUMS = "resume/checksums.json"


def truncate(folder: Path, chance: random.Random) -> str:
    file = _some_file(folder, chance)
    length = chance.randrange(1, file.stat().st_size)
    with file.open("r+b") as handle:
        handle.truncate(length)
    return f"{file.name} cut to {length} bytes"


def empty(folder: Path, chance: random.Random) -> str:
    file = _some_file(folder, chance)
    file.write_bytes(b"")
    return f"{file.name} emptied"


def flip_bit(folder: Path, chance: random.Random) -> str:
    file = _some_file(folder, chance)
    place, bit = chance.randrange(file.stat().st_size), chance.randrange(8)
    with file.open("r+b") as handle:
        handle.seek(place)
        byte = handle.read(1)[0]
        handle.seek(place)
        handle.write(bytes([byte ^ 1 << bit]))
    return f"{file.name}: bit {bit} of byte {place} flipped"


def remove(folder: Path, chance: random.Random) -> str:
    file = _some_file(folder, chance)
    file.unlink()
    return f"{file.name} removed"


def remove_checksums(folder: Path, chance: random.Random) -> str:
    (folder / CHECKSUMS).unlink()
    return f"{CHECKSUMS} removed"


def undo_rename(folder: Path, chance: random.Random) -> str:
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
"""(a checkpoint's folder, chance) -> what was done, in words."""


def _some_file(folder: Path, chance: random.Random) -> Path:
    """Large and small files alike, so that a bit of the optimizer is as likely as one of the tokenizer."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 1]
    return chance.choice(sorted(files))
