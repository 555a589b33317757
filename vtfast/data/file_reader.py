"""Reads the rows of a data file, as plain Python values; `vtfast.data.row_parser` makes samples of them."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count, islice
from typing import TYPE_CHECKING, Any

from vtfast.data.columns import InvalidRow
from vtfast.data.data_files import DataFile
from vtfast.utils.errors import UserError
from vtfast.utils.text import first_line

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 64
"""Rows in memory at once: SAT_train.parquet is one row group of 5 GB."""
LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class RawRow:
    """A row as its file has it."""

    value: Any
    """Plain Python values, or an InvalidRow."""
    position: str
    """In its file, for messages: `line 1` as editors count, or `row 0 (counted from 0)` as programs do."""

    def mapping(self) -> Mapping[Any, Any]:
        """The columns' values. Raises InvalidRow for a row that could not be read or is something else."""
        if isinstance(self.value, Mapping):
            return self.value
        if isinstance(self.value, InvalidRow):
            raise self.value
        raise InvalidRow(f"must be a mapping of columns to values, not {type(self.value).__name__}")


def read_rows(file: DataFile, select: Callable[[list[str]], list[str]]) -> Iterator[list[RawRow]]:
    """Rows of a file in small batches; a row that cannot be read has an InvalidRow for its value.

    Args:
        select: names of columns -> the names to read; may raise UserError.

    Raises:
        UserError: the file cannot be read, or what `select` raises; the message names the file.
    """
    import pyarrow as pa

    kind = file.name.rpartition(".")[2]
    try:
        if kind == "parquet":
            yield from _parquet_batches(file, select)
        else:
            yield from _json_batches(_jsonl_rows(file) if kind == "jsonl" else _json_rows(file), select)
    except (pa.ArrowException, OSError, ValueError, RecursionError) as error:
        reason = f"not a readable {kind} file ({first_line(error).rstrip('.')}); {_remedy(file)}"
        raise UserError(f"{file.name}: {error if isinstance(error, UserError) else reason}") from error


def _remedy(file: DataFile) -> str:
    """What to do about a damaged file; clones without Git LFS hold a short text in place of each file."""
    if file.folder is None:
        return "try again, or download it and give its path"
    if not os.access(file.name, os.R_OK):
        return "check its permissions"
    with open(file.name, "rb") as content:
        pointer = content.read(len(LFS)) == LFS
    return "it is a pointer of Git LFS, so run `git lfs pull`" if pointer else "download it again"


def _parquet_batches(file: DataFile, select: Callable[[list[str]], list[str]]) -> Iterator[list[RawRow]]:
    import pyarrow.parquet as pq

    # Small buffers: the default would read a whole column of the one row group at once.
    with pq.ParquetFile(file.open(), buffer_size=1 << 20, pre_buffer=False) as table:
        columns, number = select(table.schema_arrow.names), count()
        for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=columns):
            yield [RawRow(value, f"row {next(number)} (counted from 0)") for value in _values(batch)]


def _values(batch: "pa.RecordBatch") -> list[Any]:
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, a date beyond the year 9999
        if len(batch) == 1:
            return [InvalidRow(f"has a value that cannot be read ({error})")]
        return [value for i in range(len(batch)) for value in _values(batch.slice(i, 1))]


def _json_batches(rows: Iterator[RawRow], select: Callable[[list[str]], list[str]]) -> Iterator[list[RawRow]]:
    checked = False
    while batch := list(islice(rows, BATCH_ROWS)):
        objects = [row.value for row in batch if isinstance(row.value, dict)]
        if objects and not checked:  # one row may lack a column, all rows of a batch hardly do
            select(list(dict.fromkeys(name for row in objects for name in row)))
            checked = True
        yield batch


@contextmanager
def _opened(file: DataFile) -> Iterator[Any]:
    opened = file.open()
    with open(opened, "rb") if isinstance(opened, str) else nullcontext(opened) as content:
        yield content


def _jsonl_rows(file: DataFile) -> Iterator[RawRow]:
    """Empty lines are skipped, and counted."""
    with _opened(file) as lines:
        for number, text in enumerate(lines, 1):
            if text.strip():
                yield RawRow(_json_line(text), f"line {number}")


def _json_line(text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig").rstrip())
    except (ValueError, RecursionError) as error:
        # The text of a JSONDecodeError counts lines within this one.
        reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        return InvalidRow(f"not JSON ({reason})")


def _json_rows(file: DataFile) -> Iterator[RawRow]:
    with _opened(file) as content:
        rows = json.loads(content.read())
    if not isinstance(rows, list):
        raise UserError(
            f"must be a JSON list of rows, not {type(rows).__name__}; a file with one row per line is called .jsonl"
        )
    for number, value in enumerate(rows):
        yield RawRow(value, f"row {number} (counted from 0)")
