"""A benchmark's files -> examples: a file, a folder in the data set's layout, or a hub id."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from vtfast.data import InvalidRow
from vtfast.data.file_reader import DataFile, RawRow, jsonl_rows, parquet_batches
from vtfast.evaluate.benchmark import Benchmark, Example
from vtfast.utils.errors import UserError
from vtfast.utils.files import expand
from vtfast.utils.hub import hub_files, is_hub_id, open_dataset_file
from vtfast.utils.suggestions import did_you_mean


def load_examples(benchmark: Benchmark, source: str | Path | None = None) -> Iterator[Example]:
    """The examples of a benchmark in file order, read as they are asked for.

    Raises:
        UserError: no such source, an unreadable file, or a row that cannot be asked. A benchmark without some of its
            rows is another benchmark, so none is skipped.
    """
    index = 0
    for file in find_files(benchmark, str(source or benchmark.hub_id)):
        for entry in read_rows(file, benchmark.columns):
            row, where = entry.value, f"{file.name}, {entry.place}"
            if isinstance(row, InvalidRow):
                raise UserError(f"{where}: {row}")
            if benchmark.use(row):
                try:
                    example = benchmark.read(row, index)
                    if not example.images:
                        raise InvalidRow("it has no image")
                except InvalidRow as error:
                    raise UserError(f"{where}: {error}") from error
                images = (_placed(image, file.folder) for image in example.images)
                yield dataclasses.replace(example, images=tuple(images), where=where)
            index += 1


def _placed(image: bytes | Path, folder: Path | None) -> bytes | Path:
    """Image paths start from the file that names them, or from `images` beside it."""
    if folder is None or isinstance(image, bytes):
        return image
    return next((p for p in (folder / image, folder / "images" / image) if p.is_file()), folder / image)


def find_files(benchmark: Benchmark, source: str) -> list[DataFile]:
    """The files of a source that the benchmark is made of, in the order of their names."""
    hint = f"--data {benchmark.name}=PATH gives a local file or folder"
    path = expand(source)
    if path.is_file():
        if path.suffix not in (".parquet", ".jsonl"):
            raise UserError(f"{source}: unknown kind of file, .parquet or .jsonl is wanted; {hint}")
        return [DataFile(str(path), lambda: str(path), path.parent)]
    commit = None
    if not path.is_dir():
        if not is_hub_id(source):
            meant = did_you_mean(source, hint, [benchmark.hub_id])
            raise UserError(f"no such file or folder: {source}; {meant}")
        try:
            found = hub_files(source, "dataset")
        except UserError as error:
            raise UserError(f"{error}; {hint}") from error
        if isinstance(found, Path):
            path = found
        else:
            names, commit = found
    if commit is None:
        names = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
    picked = _pick(names, benchmark, source, hint)
    if commit is None:
        return [DataFile(str(path / name), lambda n=name: str(path / n), (path / name).parent) for name in picked]
    return [DataFile(f"{source}/{name}", lambda n=name: _download(source, n, commit, hint)) for name in picked]


def _download(repo: str, name: str, commit: str, hint: str) -> str | BinaryIO:
    try:
        return open_dataset_file(repo, name, commit, download=True)
    except Exception as error:  # the client's own, its http library's, the socket's
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{repo}/{name}: cannot be downloaded ({reason}); {hint}") from error


def _pick(names: list[str], benchmark: Benchmark, source: str, hint: str) -> list[str]:
    for pattern in benchmark.files:
        picked = sorted(name for name in names if re.fullmatch(pattern, name))
        if picked:
            break
    else:
        there = ", ".join(sorted(names)[:10]) or "nothing"
        raise UserError(f"{source}: no files of {benchmark.title} (there is: {there}); {hint}")
    shards: dict[tuple[str, int], int] = {}
    for name in picked:
        if shard := re.fullmatch(r"(.*)-\d+-of-(\d+)\.parquet", name):
            key = shard[1], int(shard[2])
            shards[key] = shards.get(key, 0) + 1
    for (name, total), count in shards.items():
        if count != total:
            raise UserError(f"{source}: {count} of the {total} files {name}-* are there. Download the rest; {hint}")
    return picked


def read_rows(file: DataFile, columns: tuple[str, ...]) -> Iterator[RawRow]:
    """Rows of a parquet or JSONL file. Raises UserError: not readable, or without the columns."""
    return (_jsonl_rows if file.name.endswith(".jsonl") else _parquet_rows)(file, columns)


def _parquet_rows(file: DataFile, columns: tuple[str, ...]) -> Iterator[RawRow]:
    def all_of_them(there: list[str]) -> list[str]:
        _check_columns(file, there, columns)
        return there

    for batch in parquet_batches(file, all_of_them):
        yield from batch


def _jsonl_rows(file: DataFile, columns: tuple[str, ...]) -> Iterator[RawRow]:
    for entry in jsonl_rows(file):
        if isinstance(entry.value, dict):
            _check_columns(file, list(entry.value), columns)
        elif not isinstance(entry.value, InvalidRow):
            raise UserError(f"{file.name}, {entry.place}: not a row of named values")
        yield entry


def _check_columns(file: DataFile, there: list[str], wanted: tuple[str, ...]) -> None:
    missing = [name for name in wanted if name not in there]
    if missing:
        raise UserError(f"{file.name}: no column {', '.join(missing)} (there is: {', '.join(there)})")
