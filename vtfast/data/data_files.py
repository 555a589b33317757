"""Finds the files of a data source: a file, a folder, or a hub id."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from vtfast.utils.did_you_mean import did_you_mean
from vtfast.utils.errors import UserError
from vtfast.utils.files import expand
from vtfast.utils.hub import DATASETS, hub_files, is_hub_id, open_dataset_file
from vtfast.utils.text import first_line

SUFFIXES = (".parquet", ".jsonl", ".json")
"""A folder is read by the first of these that it holds."""
_SYNONYMS = {"val": "validation", "validation": "val"}


@dataclass
class DataFile:
    """One file of a source."""

    name: str
    """Its name in messages: the path, or the id and name on the hub."""
    open: Callable[[], str | BinaryIO]
    """-> a path or a binary file object."""
    folder: Path | None = None
    """What relative image paths in it start from; None on the hub."""


def find_files(source: str, split: str | None, stream: bool) -> list[DataFile]:
    """The files of a source, in order.

    Args:
        source: a .parquet, .jsonl or .json file, a folder of them, or a data set's hub id.
        split: selected by file name in folders and on the hub; None: "train" (or the only file, if it names no
            split). A source that is a file is used whatever its name.
        stream: on the hub, read only as far as needed instead of downloading whole files.

    Raises:
        UserError: no such source, or a split that matches no or several files.
    """
    hint = (
        "give a .parquet, .jsonl or .json file, a folder of such files, or the hub id of a data set such as array/SAT"
    )
    found = find_source(source, SUFFIXES, hint, [*DATASETS, "synthetic"])
    if not isinstance(found, Path):
        names, commit = found
        return [hub_file(source, name, commit, stream) for name in _pick(names, split, source)]
    return [local_file(file) for file in (_files_in_folder(found, split) if found.is_dir() else [found])]


def find_source(source: str, suffixes: Sequence[str], hint: str, known: Sequence[str]) -> Path | tuple[list[str], str]:
    """The path of a file or folder, or the names of a hub repository's files and their commit.

    Args:
        suffixes: of a file that can be read.
        hint: what to do about a missing source, for its message.
        known: ids or names that may have been meant.
    """
    path = expand(source)
    if path.is_dir():
        return path
    if path.exists() and path.suffix not in suffixes:
        kinds = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"
        raise UserError(
            f"{source}: unknown kind of file, expected {kinds}; pandas converts a CSV: read_csv(...).to_parquet(...)"
        )
    if path.exists():
        return path
    if not is_hub_id(source):
        raise UserError(f"no such file or folder: {source}; {did_you_mean(source, hint, known)}")
    return hub_files(source, "dataset")


def _files_in_folder(folder: Path, split: str | None) -> list[Path]:
    """The files of a split in a folder, or in its subfolder `data`."""
    files = [file for file in folder.iterdir() if file.is_file()]
    if not any(file.suffix in (".parquet", ".jsonl") for file in files) and (folder / "data").is_dir():
        files = [file for file in (folder / "data").iterdir() if file.is_file()]
    data_files = [file for file in files if file.suffix in SUFFIXES]
    if len(data_files) == 1 and data_files[0].suffix == ".json":
        return data_files  # VisualThinker's JSON beside its folder of images
    by_name = {file.relative_to(folder).as_posix(): file for file in files}
    return [by_name[name] for name in _pick(by_name, split, str(folder))]


def local_file(path: Path) -> DataFile:
    return DataFile(str(path), lambda: str(path), path.parent)


def hub_file(repo: str, name: str, commit: str, stream: bool) -> DataFile:
    return DataFile(f"{repo}/{name}", partial(_open_hub_file, repo, name, commit, stream))


def _open_hub_file(repo: str, name: str, commit: str, stream: bool) -> str | BinaryIO:
    try:
        return open_dataset_file(repo, name, commit, download=not stream)
    except Exception as error:  # the client's own, its http library's, the socket's
        raise UserError(f"cannot be fetched ({first_line(error)})") from error


def _pick(names: Iterable[str], split: str | None, where: str) -> list[str]:
    """The names of a split's files, in the order of their numbers. `where`: what messages call the source."""
    names = sorted(names)
    by_suffix = ([name for name in names if name.endswith(suffix)] for suffix in SUFFIXES)
    candidates = next(filter(None, by_suffix), [])
    wanted = split or "train"
    picked = _of_split(candidates, wanted) or _of_split(candidates, _SYNONYMS.get(wanted))
    if not picked and split is None and len(candidates) == 1:
        picked = candidates
    families = {re.sub(r"[-_.]\d+(-of-\d+)?(?=\.\w+$)", "", name) for name in picked}
    if len(families) != 1:
        problem = (
            f"several files could be split {wanted!r}"
            if picked
            else f"no split {wanted!r}"
            if candidates
            else f"no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file"
        )
        existing = ", ".join((candidates or names)[:20]) or "nothing"
        raise UserError(
            f"{where}: {problem} (there is: {existing}). Give one of the files, or another split; "
            "file names name the split, such as SAT_train.parquet or train-00000-of-00002.parquet"
        )
    check_complete(picked, where)
    return sorted(picked, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])


def _of_split(names: Sequence[str], split: str | None) -> list[str]:
    return [name for name in names if split in re.split(r"[-_./]", name)]


def check_complete(names: Iterable[str], where: str) -> None:
    """Raises UserError if files of a numbered set, such as train-00000-of-00002.parquet, are missing."""
    shards = Counter(match.groups() for name in names if (match := re.fullmatch(r"(.*?)-?\d+-of-(\d+)\.\w+", name)))
    for (family, total), count in shards.items():
        if count != int(total):
            raise UserError(
                f"{where}: {count} of the {int(total)} files {family}-* are there. Download the rest, or give one file"
            )
