"""Questions out of files, folders and hub ids: SAT and its relatives, other published sets, or one's own.

A row that cannot be used is skipped and reported with its file and its place in it: the line of a text file, from 1, or
the row of another, from 0. `Sample.row` counts from 0, in file order, over all files of the split.
`vtfast.data.columns` lists the sets that are recognised and how to name the columns of others.
"""

import dataclasses
import logging
import random
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from vtfast.data.columns import AUTO_COLUMNS, Columns
from vtfast.data.file_reader import DataFile, RawRow, find_files, read_rows
from vtfast.data.row_parser import ALL, FilteredOut, InvalidRow, RowFilter, Sample, parse_row, where_of
from vtfast.utils.errors import UserError

log = logging.getLogger("vtfast")


class Samples(list[Sample]):
    """The usable rows of a source, and which ones were not."""

    def __init__(
        self,
        samples: Iterable[Sample] = (),
        skipped: Iterable[tuple[int, str]] = (),
        source: str = "",
        where: Mapping[int, str] | None = None,
    ) -> None:
        super().__init__(samples)
        self.skipped = list(skipped)
        """(number of the row in the source, from 0; reason)"""
        self.where = dict(where or {})
        """File and place in it of each skipped row, by its number; as `Sample.where`."""
        self.source = source


@dataclass(frozen=True)
class RowResult:
    """What became of one row: a sample, a bad row, or one that the row_filter leaves out."""

    number: int
    """In the source, from 0."""
    place: str
    """What messages call it in its file."""
    file: str
    result: Sample | InvalidRow | FilteredOut

    def __str__(self) -> str:
        return f"{self.file}, {self.place}: {self.result}"


def load_samples(
    source: str | Path,
    split: str | None = None,
    limit: int | None = None,
    *,
    on_bad: Literal["skip", "error"] = "skip",
    columns: Columns = AUTO_COLUMNS,
    row_filter: RowFilter = ALL,
    first_rows: int | None = None,
) -> Samples:
    """The questions of a data set, in file order.

    Args:
        source: a parquet, JSONL or JSON file, a folder of such files, or a hub id such as `array/SAT`.
        split: which files of a folder or hub id, told by their names; "train" where None.
        limit: stop behind this many usable rows, reading no further. On the hub, only what is
            read is fetched then; without a limit, whole files are downloaded once and kept.
        on_bad: "skip" leaves unusable rows out, into `.skipped` and one logged warning; "error"
            stops at the first.
        columns: names of columns that are not recognised by themselves.
        row_filter: rows outside of it are left out, and counted in the log.
        first_rows: look at this many rows and no more; what is unusable or not selected among them is not made up for.

    Raises:
        UserError: nothing there, not readable, wrong columns, no usable row, or an unusable row
            with on_bad="error".
    """
    source = str(source)
    if on_bad not in ("skip", "error"):
        raise UserError(f"on_bad={on_bad!r}: skip or error is wanted")
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit}: 1 or more is wanted, or none at all")
    samples, bad, left_out = Samples(source=source), [], []
    rows = iter_rows(
        source, split, columns=columns, row_filter=row_filter, first_rows=first_rows, stream=limit is not None
    )
    # Ranks other than the first keep their log, and with it their bar, to themselves.
    quiet = not log.isEnabledFor(logging.INFO)
    for row in tqdm(rows, desc=source, unit="row", delay=2, leave=False, disable=quiet):
        if isinstance(row.result, Sample):
            samples.append(row.result)
            if len(samples) == limit:
                break
        elif isinstance(row.result, FilteredOut):
            left_out.append(str(row))
        else:
            bad.append(str(row))
            if on_bad == "error":
                raise UserError(f"{bad[0]}. Mend the row, or skip such rows (on_bad=skip, --on_bad_sample skip)")
            samples.skipped.append((row.number, str(row.result)))
            samples.where[row.number] = where_of(row.file, row.place)
    total = len(samples) + len(bad) + len(left_out)
    if not samples:
        first = "; ".join([*bad[:3], *left_out[:1]]) or "it has no rows"
        raise UserError(f"{source}: no usable row among {total}. {first}")
    if left_out:
        log.info("left out %d of %d rows, the first: %s", len(left_out), total, left_out[0])
    if bad:
        more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
        log.warning("skipped %d of %d rows: %s%s", len(bad), total, "; ".join(bad[:3]), more)
    return samples


def iter_rows(
    source: str | Path,
    split: str | None = None,
    *,
    columns: Columns = AUTO_COLUMNS,
    row_filter: RowFilter = ALL,
    first_rows: int | None = None,
    stream: bool = False,
) -> Iterator[RowResult]:
    """Every row of a source, read and its images checked, one after another: nothing of the rows before is kept.

    Args:
        columns, row_filter, first_rows: as for `load_samples`.
        stream: on the hub, fetch only what is read; so also with `first_rows`.

    Raises:
        UserError: nothing there, not readable, or wrong columns. What is wrong with a row is in its `RowResult`.
    """
    number = 0
    files = find_files(str(source), split, stream=stream or first_rows is not None)
    with ThreadPoolExecutor(max_workers=8) as pool:  # decoders leave the interpreter lock alone
        for file in files:
            for batch in read_rows(file, columns):
                batch = batch if first_rows is None else batch[: first_rows - number]

                def read(entry: RawRow, row: int, file: DataFile = file):
                    return _try(entry, row, file, columns, row_filter)

                results = pool.map(read, batch, range(number, number + len(batch)))
                for entry, result in zip(batch, results, strict=True):
                    yield RowResult(number, entry.place, file.name, result)
                    number += 1
                if number == first_rows:
                    return


def _try(
    entry: RawRow, row: int, file: DataFile, columns: Columns, row_filter: RowFilter
) -> Sample | InvalidRow | FilteredOut:
    try:
        return parse_row(
            entry.value,
            columns=columns,
            row_filter=row_filter,
            row=row,
            place=entry.place,
            source=file.name,
            folder=file.folder,
        )
    except (InvalidRow, FilteredOut) as problem:
        return problem


def shuffle_options(samples: Samples, seed: int) -> Samples:
    """The same samples with the options of each in an order drawn from (seed, row).

    SAT's generator puts the right answer first, so options have to be shuffled before a model sees
    them.
    """
    shuffled = []
    for sample in samples:
        options = list(sample.options)
        random.Random(f"{seed}/{sample.row}").shuffle(options)
        shuffled.append(dataclasses.replace(sample, options=options))
    return Samples(shuffled, samples.skipped, samples.source, samples.where)
