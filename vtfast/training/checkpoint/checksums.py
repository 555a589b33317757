"""The files of a checkpoint: writing and checking their checksums, copying and deleting whole folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from vtfast.utils.files import flush, sha256, write_atomically
from vtfast.utils.text import shorten

CHECKSUMS = "resume/checksums.json"
SETTINGS = "resume/config.yaml"
STATE = "resume/state.json"
RANK_FILES = "resume/rank-*.safetensors"
REQUIRED = (STATE, SETTINGS, "resume/rank-0.safetensors")


class Checksum(TypedDict):
    size: int
    """Bytes."""
    sha256: str
    """Hex digest."""


Checksums = dict[str, Checksum]
"""By the file's name in the checkpoint's folder."""
FileStats = tuple[tuple[str, int, int], ...]


def copy_whole(source: Path, to: Path) -> None:
    """Copy a folder. It gets the name `to` once all of it is on the disk."""
    partial = to.with_name(f".{to.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    for path in (partial, *partial.rglob("*")):
        flush(path)
    partial.rename(to)
    flush(to.parent)


def remove(folder: Path) -> None:
    """Delete a folder. It is renamed first, so that a half-deleted one is never taken for a whole one."""
    doomed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    shutil.rmtree(folder.rename(doomed))


def checksums_of(folder: Path, files: Iterable[Path]) -> Checksums:
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(files)
    }


def write_checksums(folder: Path, parts: Iterable[Checksums]) -> None:
    """Write the checkpoint's last file. `parts`: for each rank the checksums of the files that it wrote."""
    merged = {name: entry for part in parts for name, entry in part.items()}
    write_atomically(folder / CHECKSUMS, json.dumps(merged, indent=1) + "\n")


def find_damage(folder: Path, only: str | None = None) -> str | None:
    """Read every byte of a checkpoint, or only the file `only` -> what is damaged; None if nothing is."""
    if not (folder / CHECKSUMS).is_file():
        return f"{CHECKSUMS} is missing: the checkpoint is incomplete, or not made for resuming"
    name = CHECKSUMS
    try:
        expected = _read_checksums(folder)
        for name in REQUIRED:
            if name not in expected:
                return f"{CHECKSUMS} does not list {name}"
        for name in (only,) if only else expected:
            file, size = folder / name, expected[name]["size"]
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes instead of {size}"
            if sha256(file) != expected[name]["sha256"]:
                return f"{name} is damaged (its checksum is wrong)"
    except ValidationError:
        return f"{CHECKSUMS} is damaged"
    except OSError as error:
        return f"{shorten(name)} cannot be read ({error.strerror})"
    return None


def unlisted(folder: Path) -> list[str]:
    """Names of rank files that are not in the checksums of a whole checkpoint."""
    listed = _read_checksums(folder)
    names = (path.relative_to(folder).as_posix() for path in folder.glob(RANK_FILES))
    return sorted(name for name in names if name not in listed)


def file_stats(folder: Path) -> FileStats:
    """(name, bytes, time of modification in ns) of every file: unchanged as long as nobody writes to any of them."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = (path.relative_to(folder.parent).as_posix() for path in files)
    stats = (path.stat() for path in files)
    return tuple((name, s.st_size, s.st_mtime_ns) for name, s in zip(names, stats, strict=True))


def _read_checksums(folder: Path) -> Checksums:
    return TypeAdapter(Checksums).validate_json((folder / CHECKSUMS).read_bytes())
