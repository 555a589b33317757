"""The nearest valid name for one that does not exist, as the end of an error message."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path


def closest(name: str | Path, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The name or path of `known` whose last part is most like that of `name`; None if none is like it."""
    by_last_part: dict[str, str] = {}
    for other in known:
        by_last_part.setdefault(other.split("/")[-1].lower(), other)
    last_part = str(name).rstrip("/").split("/")[-1].lower()
    found = difflib.get_close_matches(last_part, by_last_part, n=1, cutoff=cutoff)
    return by_last_part[found[0]] if found and by_last_part[found[0]] != str(name) else None


def question(meant: str | None, otherwise: str) -> str:
    """`did you mean X?`, or `otherwise` if there is no X."""
    return f"did you mean {meant}?" if meant else otherwise


def nearest(name: str, valid: Sequence[str]) -> str:
    """`did you mean X?`, or the list of all valid names."""
    return question(closest(name, valid, cutoff=0.5), f"valid are {', '.join(sorted(valid))}")


def did_you_mean(path: str | Path, otherwise: str, known: Iterable[str] = ()) -> str:
    """`did you mean X?`, or `otherwise`: X is of `known`, or lies in the same folder as the missing `path`."""
    return question(closest(path, [*known, *_siblings(path)]), otherwise)


def _siblings(path: str | Path) -> list[str]:
    folder = Path(path).parent
    expanded = os.path.expanduser(folder)
    entries = Path(expanded).glob("*") if os.path.isdir(expanded) else ()
    return [str(folder / entry.name) for entry in entries]


def near_run(path: Path) -> str | None:
    """The run folder that `path` lies in, or the first one that lies in it; None if there is none."""
    above = [path, *path.parents][:4]  # RUN/checkpoints/step-N/file
    for folder in (*above, *sorted(path.glob("*"))):
        if os.path.isfile(folder / "config.yaml"):  # False for a folder without permission, where Path.is_file raises
            return str(folder)
    return None
