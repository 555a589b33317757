"""The files of a checkpoint: their checksums, and what is wrong with one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vtfast.utils.files import flush, sha256, shortened, write_whole

CHECKSUMS = "resume/checksums.json"
SETTINGS = "resume/config.yaml"
STATE = "resume/state.json"
PARTS = "resume/rank-*.safetensors"
REQUIRED = (STATE, SETTINGS, "resume/rank-0.safetensors")


def place(source: Path, to: Path) -> None:
    """Copy a folder to where it is to stay: all of it is on the disk once it has that name."""
    partial = to.with_name(f".{to.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    for path in (partial, *partial.rglob("*")):
        flush(path)
    partial.rename(to)
    flush(to.parent)


def remove(folder: Path) -> None:
    """Delete a folder. It loses its name first, so that half of it is never taken for the whole."""
    doomed = folder.with_name(f".{folder.name}.removed")
    if folder != doomed and folder.exists():
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
    shutil.rmtree(doomed)


def sums(folder: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """{name in `folder`: {"size": bytes, "sha256": hex digest}}"""
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(files)
    }


def write_sums(folder: Path, parts: Iterable[dict[str, dict[str, Any]]]) -> None:
    """The checkpoint's last file, from what each rank says of the files that it wrote."""
    merged = {name: entry for part in parts for name, entry in part.items()}
    write_whole(folder / CHECKSUMS, json.dumps(merged, indent=1) + "\n")


def damage(folder: Path, only: str | None = None) -> str | None:
    """What is wrong with a checkpoint, in words; None for a whole one. Reads every byte of it, or `only` one file."""
    try:
        expected = _read_sums(folder)
        for name in (only,) if only else expected:
            _check(folder, name, *expected[name])
    except _Damaged as damaged:
        return str(damaged)
    return None


def unlisted(folder: Path) -> list[str]:
    """Names of parts of the optimizer that a whole checkpoint's sums do not vouch for."""
    listed = _read_sums(folder)
    parts = (path.relative_to(folder).as_posix() for path in folder.glob(PARTS))
    return sorted(name for name in parts if name not in listed)


def stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of every file. As long as it is the same, nobody has written to any of them."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = (path.relative_to(folder.parent).as_posix() for path in files)
    found = (path.stat() for path in files)
    return tuple((name, s.st_size, s.st_mtime_ns) for name, s in zip(names, found, strict=True))


class _Damaged(Exception):
    pass


def _read_sums(folder: Path) -> dict[str, tuple[int, str]]:
    """{name: (bytes, SHA-256)}"""
    path = folder / CHECKSUMS
    if not path.is_file():
        raise _Damaged(f"{CHECKSUMS} is missing: not completely written, or not meant to be resumed")
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        expected = {str(name): (int(e["size"]), str(e["sha256"])) for name, e in listed.items()}
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError):
        raise _Damaged(f"{CHECKSUMS} is damaged") from None
    for name in REQUIRED:
        if name not in expected:
            raise _Damaged(f"{CHECKSUMS} does not list {name}")
    return expected


def _check(folder: Path, name: str, size: int, digest: str) -> None:
    if ".." in Path(name).parts or Path(name).is_absolute():
        raise _Damaged(f"{CHECKSUMS} names {name}, which is outside")
    file = folder / name
    try:
        if not file.is_file():
            raise _Damaged(f"{name} is missing")
        if file.stat().st_size != size:
            raise _Damaged(f"{name} has {file.stat().st_size} bytes instead of {size}")
        if sha256(file) != digest:
            raise _Damaged(f"{name} is damaged (its checksum is another)")
    except OSError as error:
        raise _Damaged(f"{shortened(name)} cannot be read ({error.strerror})") from None
