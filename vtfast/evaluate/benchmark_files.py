"""A benchmark's files -> examples: a file, a folder in the data set's layout, or a hub id."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from vtfast.data import InvalidRow
from vtfast.data.data_files import DataFile, local_file
from vtfast.data.file_reader import RawRow, jsonl_rows, parquet_batches
from vtfast.evaluate.benchmark import Benchmark, Example
from vtfast.utils.did_you_mean import did_you_mean
from vtfast.utils.errors import UserError
from vtfast.utils.files import expand
from vtfast.utils.hub import hub_files, is_hub_id, open_dataset_file
from vtfast.utils.text import first_line


def load_examples(benchmark: Benchmark, source: str | Path | None = None) -> Iterator[Example]:
    """The examples of a benchmark in file order, read lazily.

    Raises:
        UserError: no such source, an unreadable file, or a row that cannot be used. No row is skipped: a score
            over fewer rows would not be comparable.
    """
    index = 0
    for file in find_benchmark_files(benchmark, str(source or benchmark.hub_id)):
        for raw in read_rows(file, benchmark.columns):
            row, where = raw.value, f"{file.name}, {raw.position}"
            try:
                if isinstance(row, InvalidRow):
                    raise row
                if benchmark.include_row(row):
                    yield _example(benchmark, row, index, file.folder, where)
            except InvalidRow as error:
                raise UserError(f"{where}: {error}") from error
            index += 1


def _example(benchmark: Benchmark, row: Mapping[str, Any], index: int, folder: Path | None, where: str) -> Example:
    example = benchmark.read(row, index)
    if not example.images:
        raise InvalidRow("it has no image")
    images = tuple(_resolve(image, folder) for image in example.images)
    return dataclasses.replace(example, images=images, where=where)


def _resolve(image: bytes | Path, folder: Path | None) -> bytes | Path:
    """Image paths are relative to the file that names them, or to `images` beside it."""
    if folder is None or isinstance(image, bytes):
        return image
    return next((p for p in (folder / image, folder / "images" / image) if p.is_file()), folder / image)


def find_benchmark_files(benchmark: Benchmark, source: str) -> list[DataFile]:
    """The benchmark's files in a source, sorted by name."""
    hint = f"--data {benchmark.name}=PATH gives a local file or folder"
    path = expand(source)
    if path.is_file():
        if path.suffix not in (".parquet", ".jsonl"):
            raise UserError(f"{source}: unknown kind of file, expected .parquet or .jsonl; {hint}")
        return [local_file(path)]
    if not path.is_dir():
        if not is_hub_id(source):
            meant = did_you_mean(source, hint, [benchmark.hub_id])
            raise UserError(f"no such file or folder: {source}; {meant}")
        try:
            files = hub_files(source, "dataset")
        except UserError as error:
            raise UserError(f"{error}; {hint}") from error
        if not isinstance(files, Path):
            names, commit = files
            picked = _pick(names, benchmark, source, hint)
            return [DataFile(f"{source}/{name}", partial(_download, source, name, commit, hint)) for name in picked]
        path = files
    names = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
    return [local_file(path / name) for name in _pick(names, benchmark, source, hint)]


def _download(repo: str, name: str, commit: str, hint: str) -> str | BinaryIO:
    try:
        return open_dataset_file(repo, name, commit, download=True)
    except Exception as error:  # the client's own, its http library's, the socket's
        raise UserError(f"{repo}/{name}: cannot be downloaded ({first_line(error)}); {hint}") from error


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
    def check(names: list[str]) -> list[str]:
        _check_columns(file, names, columns)
        return names

    for batch in parquet_batches(file, check):
        yield from batch


def _jsonl_rows(file: DataFile, columns: tuple[str, ...]) -> Iterator[RawRow]:
    for raw in jsonl_rows(file):
        if isinstance(raw.value, dict):
            _check_columns(file, list(raw.value), columns)
        elif not isinstance(raw.value, InvalidRow):
            raw = RawRow(InvalidRow("not a JSON object"), raw.position)
        yield raw


def _check_columns(file: DataFile, names: list[str], required: tuple[str, ...]) -> None:
    missing = [name for name in required if name not in names]
    if missing:
        raise UserError(f"{file.name}: no column {', '.join(missing)} (there is: {', '.join(names)})")
