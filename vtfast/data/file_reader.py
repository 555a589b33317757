"""Files of questions -> rows: which files a source means, and their rows one after another.

Rows are left as the files have them; `vtfast.data.row_parser` reads them.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtfast.data.columns import AUTO_COLUMNS, Columns, keys
from vtfast.data.row_parser import InvalidRow
from vtfast.utils.errors import UserError
from vtfast.utils.files import expand
from vtfast.utils.hub import DATASETS, hub_files, is_hub_id, open_dataset_file
from vtfast.utils.suggestions import did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 64  # SAT_train.parquet is one row group of 5 GB: never more than this at once
LONGEST_LINE = 50_000_000  # bytes of a JSON row, which holds texts and paths and no pixels
LFS = b"version https://git-lfs"
KINDS = (".parquet", ".jsonl", ".json")  # of files; a folder is read by the first that it holds
_SAME_SPLIT = {"val": "validation", "validation": "val"}


@dataclass
class DataFile:
    """One file of a source."""

    name: str
    """What messages call it: its path, or its id and name on the hub."""
    open: Callable[[], Any]
    """-> a path or a binary file object."""
    folder: Path | None = None
    """What relative image paths in it start from; None on the hub."""


@dataclass(frozen=True)
class RawRow:
    """A row as its file has it."""

    value: Any
    """Plain Python values, or an InvalidRow."""
    place: str
    """What messages call it in its file."""


def line(number: int) -> str:
    """The place of a row of a text file, as an editor counts: from 1, empty lines too."""
    return f"line {number}"


def row(number: int) -> str:
    """The place of a row of any other file, as programs count."""
    return f"row {number} (counted from 0)"


def find_files(source: str, split: str | None, stream: bool) -> list[DataFile]:
    """The files of a source, in order.

    Args:
        source: a .parquet, .jsonl or .json file, a folder of them, or a data set's hub id.
        split: chosen by file name in folders and on the hub, "train" where None (a lone file that
            names no split will do). A file given itself is taken whatever its name.
        stream: on the hub, read only as far as needed instead of downloading whole files.

    Raises:
        UserError: no such source, or no or several answers to which files the split means.
    """
    path = expand(source)
    if not path.exists():
        if not is_hub_id(source):
            wanted = (
                "give a .parquet, .jsonl or .json file, a folder of such files, or the hub id of a"
                " data set such as array/SAT"
            )
            meant = did_you_mean(source, wanted, [*DATASETS, "synthetic"])
            raise UserError(f"no such file or folder: {source}; {meant}")
        found = hub_files(source, "dataset")
        if not isinstance(found, Path):
            names, commit = found
            return [_hub_file(source, name, commit, stream) for name in _pick(names, split, source)]
        path = found
    if path.is_dir():
        files = [file for file in path.iterdir() if file.is_file()]
        if not any(file.suffix in KINDS[:2] for file in files) and (path / "data").is_dir():
            files = [file for file in (path / "data").iterdir() if file.is_file()]
        lone = [file for file in files if file.suffix in KINDS]
        if len(lone) == 1 and lone[0].suffix == ".json":
            return [_local_file(lone[0])]  # VisualThinker's JSON beside its folder of images
        by_name = {file.relative_to(path).as_posix(): file for file in files}
        return [_local_file(by_name[name]) for name in _pick(by_name, split, str(path))]
    if path.suffix not in KINDS:
        raise UserError(
            f"{source}: unknown kind of file, a .parquet, .jsonl or .json file is wanted; pandas turns a CSV into"
            " one: read_csv(...).to_parquet(...)"
        )
    return [_local_file(path)]


def _local_file(path: Path) -> DataFile:
    return DataFile(str(path), lambda: str(path), path.parent)


def _hub_file(repo: str, name: str, commit: str, stream: bool) -> DataFile:
    def opened():
        return open_dataset_file(repo, name, commit, download=not stream)

    return DataFile(f"{repo}/{name}", opened)


def _pick(names: Iterable[str], split: str | None, where: str) -> list[str]:
    """The files of a split, in the order of their numbers."""
    names = sorted(names)
    by_kind = ([name for name in names if name.endswith(kind)] for kind in KINDS)
    rows = next(filter(None, by_kind), [])
    wanted = split or "train"
    for word in filter(None, (wanted, _SAME_SPLIT.get(wanted))):
        picked = [name for name in rows if word in re.split(r"[-_./]", name)]
        if picked:
            break
    if not picked and split is None and len(rows) == 1:
        picked = rows
    families = {re.sub(r"[-_.]\d+(-of-\d+)?(?=\.\w+$)", "", name) for name in picked}
    if len(families) != 1:
        problem = (
            f"several files could be split {wanted!r}"
            if picked
            else f"no split {wanted!r}"
            if rows
            else f"no {', '.join(KINDS[:-1])} or {KINDS[-1]} file"
        )
        there = ", ".join((rows or names)[:20]) or "nothing"
        raise UserError(
            f"{where}: {problem} (there is: {there}). Give one of the files, or another split; "
            "splits are told by file names such as SAT_train.parquet or train-00000-of-00002.parquet"
        )
    total = re.search(r"-of-(\d+)\.\w+$", picked[0])
    if total and len(picked) != int(total[1]):
        raise UserError(
            f"{where}: {len(picked)} of the {int(total[1])} files of split {wanted!r} are there "
            f"({', '.join(picked[:20])}). Download the rest, or give one file itself"
        )
    return sorted(picked, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])


def read_rows(file: DataFile, columns: Columns = AUTO_COLUMNS) -> Iterator[list[RawRow]]:
    """Rows of a file in small batches; a line that is no JSON is an InvalidRow.

    Args:
        columns: columns that are not recognised by themselves; others than needed are not read.

    Raises:
        UserError: not readable, or without the columns.
    """
    if file.name.endswith(".parquet"):
        yield from _parquet_rows(file, columns)
        return
    entries = jsonl_rows(file) if file.name.endswith(".jsonl") else _json_rows(file)
    first = True
    while batch := list(islice(entries, BATCH_ROWS)):
        values = [entry.value for entry in batch]
        if first and any(isinstance(value, dict) for value in values):
            columns.check(keys(values), file.name)  # rows may lack columns, but hardly 64 of them
            first = False
        yield batch


def _parquet_rows(file: DataFile, columns: Columns) -> Iterator[list[RawRow]]:
    def wanted(there: list[str]) -> list[str]:
        columns.check(there, file.name)
        return columns.wanted(there)

    return parquet_batches(file, wanted)


def parquet_batches(file: DataFile, wanted: Callable[[list[str]], list[str]]) -> Iterator[list[RawRow]]:
    """Rows of a parquet file in small batches; one that has no value in Python is an InvalidRow. `wanted`: names of its
    columns -> those to read, or a UserError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Small buffers: the default would read a whole column of the one row group at once.
        with pq.ParquetFile(file.open(), buffer_size=1 << 20, pre_buffer=False) as table:
            columns, number = wanted(table.schema_arrow.names), count()
            for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=columns):
                yield [RawRow(value, row(next(number))) for value in _values(batch)]
    except UserError:
        raise
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        raise UserError(f"{file.name}: not a readable parquet file ({reason}); {_remedy(file)}") from error


def _remedy(file: DataFile) -> str:
    """For a file that is not what its name says: clones without Git LFS hold a page of text in place of each."""
    if file.folder is None:
        return "try again, or download it and give its path"
    try:
        with open(file.name, "rb") as content:
            pointer = content.read(len(LFS)) == LFS
    except OSError:
        return "see that it can be read"
    return "it is a pointer of Git LFS, so run `git lfs pull`" if pointer else "download it again"


def _values(batch: "pa.RecordBatch") -> list[Any]:
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):  # texts that are no UTF-8, dates beyond the year 9999
        return [_value(batch.slice(place, 1)) for place in range(len(batch))]


def _value(single: "pa.RecordBatch") -> Any:
    try:
        return single.to_pylist()[0]
    except (ValueError, OverflowError) as error:
        return InvalidRow(f"has a value that cannot be read ({error})")


def jsonl_rows(file: DataFile) -> Iterator[RawRow]:
    """Rows of a JSONL file, one after another; a line that is no JSON is an InvalidRow, and an empty one is no row.

    Raises UserError where the file cannot be read.
    """
    try:
        opened = file.open()
        with open(opened, "rb") if isinstance(opened, str) else nullcontext(opened) as lines:
            for number in count(1):
                text = rest = lines.readline(LONGEST_LINE)
                while len(rest) == LONGEST_LINE and not rest.endswith(b"\n"):
                    rest = lines.readline(LONGEST_LINE)
                if rest is not text:
                    yield RawRow(InvalidRow(f"more than {LONGEST_LINE} bytes"), line(number))
                elif text.strip():
                    yield RawRow(_json_line(text), line(number))
                elif not text:
                    return
    except OSError as error:
        raise UserError(f"{file.name}: not a readable JSONL file ({error})") from error


def _json_line(text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig").rstrip())
    except json.JSONDecodeError as error:  # its own text counts lines within this one
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
            f"{file.name}: a JSON list of rows is wanted, not {type(rows).__name__};"
            " a file with a row a line is called .jsonl"
        )
    for number, value in enumerate(rows):
        yield RawRow(value, row(number))
