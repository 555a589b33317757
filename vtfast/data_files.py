"""Files of questions -> rows: which files a source means, and their rows one after another.

Row formats are left as the files have them; `vtfast.data` reads them.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtfast.errors import UserError
from vtfast.hub import hub_files, is_hub_id, open_dataset_file

BATCH_ROWS = 64  # SAT_train.parquet is one row group of 5 GB: never more than this at once
IMAGE_COLUMNS = ("image_bytes", "images")
TEXT_COLUMNS = ("question", "answers", "correct_answer")
_WANTED = f"image_bytes (or images), {', '.join(TEXT_COLUMNS)}"
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


def find_files(source: str, split: str | None, stream: bool) -> list[DataFile]:
    """The files of a source, in order.

    Args:
        source: a .parquet or .json file, a folder of parquet files, or a data set's hub id.
        split: chosen by file name in folders and on the hub, "train" where None (a lone file that
            names no split will do). A file given itself is taken whatever its name.
        stream: on the hub, read only as far as needed instead of downloading whole files.

    Raises:
        UserError: no such source, or no or several answers to which files the split means.
    """
    path = Path(source).expanduser()
    if not path.exists():
        if not is_hub_id(source):
            raise UserError(
                f"no such file or folder: {source}. Give a .parquet or .json file, a folder of "
                "parquet files, or the hub id of a data set such as array/SAT"
            )
        found = hub_files(source, "dataset")
        if not isinstance(found, Path):
            names, commit = found
            return [_hub_file(source, name, commit, stream) for name in _pick(names, split, source)]
        path = found
    if path.is_dir():
        files = [file for file in path.iterdir() if file.is_file()]
        if not any(file.suffix == ".parquet" for file in files) and (path / "data").is_dir():
            files = [file for file in (path / "data").iterdir() if file.is_file()]
        lone = [file for file in files if file.suffix == ".json"]
        if len(lone) == 1 and not any(file.suffix == ".parquet" for file in files):
            return [_local_file(lone[0])]  # VisualThinker's JSON beside its folder of images
        by_name = {file.relative_to(path).as_posix(): file for file in files}
        return [_local_file(by_name[name]) for name in _pick(by_name, split, str(path))]
    if path.suffix not in (".parquet", ".json"):
        raise UserError(f"{source}: unknown kind of file, a .parquet or .json file is wanted")
    return [_local_file(path)]


def _local_file(path: Path) -> DataFile:
    return DataFile(str(path), lambda: str(path), path.parent)


def _hub_file(repo: str, name: str, commit: str, stream: bool) -> DataFile:
    def opened():
        return open_dataset_file(repo, name, commit, download=not stream)

    return DataFile(f"{repo}/{name}", opened)


def _pick(names: Iterable[str], split: str | None, where: str) -> list[str]:
    """The parquet files of a split, in the order of their numbers."""
    names = sorted(names)
    parquet = [name for name in names if name.endswith(".parquet")]
    wanted = split or "train"
    for word in filter(None, (wanted, _SAME_SPLIT.get(wanted))):
        picked = [name for name in parquet if word in re.split(r"[-_./]", name)]
        if picked:
            break
    if not picked and split is None and len(parquet) == 1:
        picked = parquet
    families = {re.sub(r"[-_.]\d+(-of-\d+)?(?=\.parquet$)", "", name) for name in picked}
    if len(families) != 1:
        problem = f"several files could be split {wanted!r}" if picked else f"no split {wanted!r}"
        there = ", ".join((parquet or names)[:20]) or "nothing"
        raise UserError(
            f"{where}: {problem} (there is: {there}). Give one of the files, or another split; "
            "splits are told by file names such as SAT_train.parquet or train-00000-of-00002.parquet"
        )
    total = re.search(r"-of-(\d+)\.parquet$", picked[0])
    if total and len(picked) != int(total[1]):
        raise UserError(
            f"{where}: {len(picked)} of the {int(total[1])} files of split {wanted!r} are there "
            f"({', '.join(picked[:20])}). Download the rest, or give one file itself"
        )
    return sorted(picked, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])


def read_rows(file: DataFile) -> Iterator[list[dict[str, Any]]]:
    """Rows of a file in small batches, as plain Python values.

    Raises:
        UserError: not readable, or without the columns.
    """
    return _json_rows(file) if file.name.endswith(".json") else _parquet_rows(file)


def _parquet_rows(file: DataFile) -> Iterator[list[dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Small buffers: the default would read a whole column of the one row group at once.
        with pq.ParquetFile(file.open(), buffer_size=1 << 20, pre_buffer=False) as table:
            names = table.schema_arrow.names
            images = [name for name in IMAGE_COLUMNS if name in names][:1]
            if not images or not set(TEXT_COLUMNS) <= set(names):
                raise UserError(f"{file.name}: columns {', '.join(names)}, but {_WANTED} wanted")
            columns = [*images, *TEXT_COLUMNS, *({"question_type"} & set(names))]
            for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=columns):
                yield batch.to_pylist()
    except UserError:
        raise
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{file.name}: not a readable parquet file ({reason})") from error


def _json_rows(file: DataFile) -> Iterator[list[dict[str, Any]]]:
    try:
        rows = json.loads(Path(file.open()).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file.name}: not a readable JSON file ({error})") from error
    if not isinstance(rows, list):
        raise UserError(f"{file.name}: a JSON list of rows is wanted, not {type(rows).__name__}")
    keys = {key for row in rows if isinstance(row, dict) for key in row}
    if rows and not {"messages", "images"} <= keys:
        there = ", ".join(sorted(keys)) or "none"
        raise UserError(f"{file.name}: columns {there}, but messages and images wanted")
    for start in range(0, len(rows), BATCH_ROWS):
        yield rows[start : start + BATCH_ROWS]
