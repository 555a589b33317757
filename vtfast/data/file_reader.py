"""Reads the rows of a data file, as plain Python values; `vtfast.data.row_parser` makes samples of them."""

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtfast.data.columns import AUTO_COLUMNS, Columns, InvalidRow
from vtfast.data.data_files import DataFile
from vtfast.utils.errors import UserError
from vtfast.utils.text import first_line

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 64
"""Rows in memory at once: SAT_train.parquet is one row group of 5 GB."""
LONGEST_LINE = 50_000_000
"""Bytes of a JSON row, which holds texts and paths but no pixels."""
LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class RawRow:
    """A row as its file has it."""

    value: Any
    """Plain Python values, or an InvalidRow."""
    position: str
    """In its file, for messages."""


def line_position(number: int) -> str:
    """Of a row of a text file: counted from 1, empty lines too, as editors do."""
    return f"line {number}"


def row_position(number: int) -> str:
    """Of a row of another file: counted from 0, as programs do."""
    return f"row {number} (counted from 0)"


def read_rows(file: DataFile, columns: Columns = AUTO_COLUMNS) -> Iterator[list[RawRow]]:
    """Rows of a file in small batches; a line that is not JSON is an InvalidRow.

    Args:
        columns: names of columns that the automatic names do not cover; only needed columns are read.

    Raises:
        UserError: not readable, or without the columns.
    """
    if file.name.endswith(".parquet"):
        yield from _parquet_rows(file, columns)
        return
    rows = jsonl_rows(file) if file.name.endswith(".jsonl") else _json_rows(file)
    checked = False
    while batch := list(islice(rows, BATCH_ROWS)):
        objects = [row.value for row in batch if isinstance(row.value, dict)]
        if objects and not checked:  # one row may lack a column, all rows of a batch hardly do
            columns.check(set().union(*objects), file.name)
            checked = True
        yield batch


def _parquet_rows(file: DataFile, columns: Columns) -> Iterator[list[RawRow]]:
    def select(names: list[str]) -> list[str]:
        columns.check(names, file.name)
        return columns.select(names)

    return parquet_batches(file, select)


def parquet_batches(file: DataFile, select: Callable[[list[str]], list[str]]) -> Iterator[list[RawRow]]:
    """Rows of a parquet file in small batches; a row that Python cannot represent is an InvalidRow.

    `select`: column names -> the names to read; may raise UserError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Small buffers: the default would read a whole column of the one row group at once.
        with pq.ParquetFile(file.open(), buffer_size=1 << 20, pre_buffer=False) as table:
            columns, number = select(table.schema_arrow.names), count()
            for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=columns):
                yield [RawRow(value, row_position(next(number))) for value in _values(batch)]
    except (pa.ArrowException, OSError) as error:
        reason = first_line(error).rstrip(".")
        raise UserError(f"{file.name}: not a readable parquet file ({reason}); {_remedy(file)}") from error


def _remedy(file: DataFile) -> str:
    """What to do about a damaged file; clones without Git LFS hold a short text in place of each file."""
    if file.folder is None:
        return "try again, or download it and give its path"
    try:
        with open(file.name, "rb") as content:
            pointer = content.read(len(LFS)) == LFS
    except OSError:
        return "check its permissions"
    return "it is a pointer of Git LFS, so run `git lfs pull`" if pointer else "download it again"


def _values(batch: "pa.RecordBatch") -> list[Any]:
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):  # text that is not UTF-8, a date beyond the year 9999
        return [_value(batch.slice(i, 1)) for i in range(len(batch))]


def _value(single: "pa.RecordBatch") -> Any:
    try:
        return single.to_pylist()[0]
    except (ValueError, OverflowError) as error:
        return InvalidRow(f"has a value that cannot be read ({error})")


def jsonl_rows(file: DataFile) -> Iterator[RawRow]:
    """Rows of a JSONL file; a line that is not JSON is an InvalidRow, and empty lines are skipped.

    Raises UserError if the file cannot be read.
    """
    try:
        opened = file.open()
        with open(opened, "rb") if isinstance(opened, str) else nullcontext(opened) as lines:
            for number in count(1):
                text = rest = lines.readline(LONGEST_LINE)
                while len(rest) == LONGEST_LINE and not rest.endswith(b"\n"):
                    rest = lines.readline(LONGEST_LINE)
                if rest is not text:
                    yield RawRow(InvalidRow(f"more than {LONGEST_LINE} bytes"), line_position(number))
                elif text.strip():
                    yield RawRow(_json_line(text), line_position(number))
                elif not text:
                    return
    except OSError as error:
        raise UserError(f"{file.name}: not a readable JSONL file ({error})") from error


def _json_line(text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig").rstrip())
    except json.JSONDecodeError as error:  # its own message counts lines within this one
        return InvalidRow(f"not JSON ({error.msg}, column {error.colno})")
    except UnicodeDecodeError as error:
        return InvalidRow(f"not UTF-8 ({error.reason}, byte {error.start + 1})")
    except (ValueError, RecursionError) as error:
        return InvalidRow(f"not JSON ({error})")


def _json_rows(file: DataFile) -> Iterator[RawRow]:
    try:
        opened = file.open()
        data = Path(opened).read_bytes() if isinstance(opened, str) else opened.read()
        rows = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file.name}: not a readable JSON file ({error})") from error
    if not isinstance(rows, list):
        raise UserError(
            f"{file.name}: must be a JSON list of rows, not {type(rows).__name__};"
            " a file with one row per line is called .jsonl"
        )
    for number, value in enumerate(rows):
        yield RawRow(value, row_position(number))
