"""A benchmark's files -> examples: a file, a folder in the data set's layout, or a hub id."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vtfast.data import InvalidRow
from vtfast.data.data_files import DataFile, check_complete, find_source, hub_file, local_file
from vtfast.data.file_reader import read_rows
from vtfast.evaluate.benchmark import Benchmark, Example
from vtfast.utils.errors import UserError, error_prefix


def load_examples(benchmark: Benchmark, source: str | Path | None = None) -> Iterator[Example]:
    """The examples of a benchmark in file order, read lazily.

    Raises:
        UserError: no such source, an unreadable file, or a row that cannot be used. No row is skipped: a score
            over fewer rows would not be comparable.
    """

    def select(names: list[str]) -> list[str]:
        if missing := [name for name in benchmark.columns if name not in names]:
            raise UserError(f"no column {', '.join(missing)} (there is: {', '.join(names)})")
        return names

    index = 0
    for file in find_benchmark_files(benchmark, str(source or benchmark.hub_id)):
        for raw in (row for batch in read_rows(file, select) for row in batch):
            where = f"{file.name}, {raw.position}"
            with error_prefix(where):
                row = raw.mapping()
                select(list(row))
                example = _example(benchmark, row, index, file.folder, where) if benchmark.include_row(row) else None
            if example is not None:
                yield example
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
    """The benchmark's files in a source, sorted by name. Raises UserError if there are none, or not all of a set."""
    try:
        found = find_source(source, (".parquet", ".jsonl"), "check the path", [benchmark.hub_id])
        if not isinstance(found, Path):
            names, commit = found
            return [hub_file(source, name, commit, stream=False) for name in _pick(names, benchmark, source)]
        if found.is_file():
            return [local_file(found)]
        names = [file.relative_to(found).as_posix() for file in found.rglob("*") if file.is_file()]
        return [local_file(found / name) for name in _pick(names, benchmark, source)]
    except UserError as error:
        raise UserError(f"{error}; --data {benchmark.name}=PATH gives a local file or folder") from error


def _pick(names: Sequence[str], benchmark: Benchmark, source: str) -> list[str]:
    for pattern in benchmark.files:
        if picked := sorted(name for name in names if re.fullmatch(pattern, name)):
            check_complete(picked, source)
            return picked
    there = ", ".join(sorted(names)[:10]) or "nothing"
    raise UserError(f"{source}: no files of {benchmark.title} (there is: {there})")
