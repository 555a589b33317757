"""Loads samples from files, folders and hub ids: SAT and its relatives, other published sets, or the user's own.

A row that cannot be used is skipped and reported with its file and its position there: the line of a text file, from 1,
or the row of another file, from 0. `Sample.row` counts from 0, in file order, over all files of the split.
`vtfast.data.columns` lists the sets that are recognised and how to name the columns of others.
"""

import dataclasses
import logging
import random
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from vtfast.data.columns import AUTO_COLUMNS, Columns, InvalidRow
from vtfast.data.data_files import DataFile, find_files
from vtfast.data.file_reader import RawRow, read_rows
from vtfast.data.row_parser import ALL, FilteredOut, RowFilter, parse_row
from vtfast.data.sample import Sample, where_of
from vtfast.utils.errors import UserError

log = logging.getLogger("vtfast")


class Samples(list[Sample]):
    """The usable rows of a source, and the skipped ones."""

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
        """`Sample.where` of each skipped row, by its number."""
        self.source = source


@dataclass(frozen=True)
class RowResult:
    """The result of parsing one row: a sample, or why it was skipped or filtered out."""

    number: int
    """In the source, from 0."""
    position: str
    """In its file, for messages."""
    file: str
    result: Sample | InvalidRow | FilteredOut

    def __str__(self) -> str:
        return f"{self.file}, {self.position}: {self.result}"


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
        split: which files of a folder or hub id, by their names; None: "train".
        limit: stop after this many usable rows. Of a hub id, only what is read is then fetched; without a limit,
            whole files are downloaded once and kept.
        on_bad: "skip" leaves unusable rows out, into `.skipped` and one logged warning; "error"
            stops at the first.
        columns: names of columns that are not recognised automatically.
        row_filter: other rows are left out, and counted in the log.
        first_rows: read this many rows, usable or not.

    Raises:
        UserError: nothing there, not readable, wrong columns, no usable row, or an unusable row
            with on_bad="error".
    """
    source = str(source)
    assert on_bad in ("skip", "error"), on_bad
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit}: must be at least 1, or None")
    samples = Samples(source=source)
    bad: list[str] = []
    filtered: list[str] = []
    rows = iter_rows(
        source, split, columns=columns, row_filter=row_filter, first_rows=first_rows, stream=limit is not None
    )
    # Ranks other than the first log only warnings, and show no bar.
    quiet = not log.isEnabledFor(logging.INFO)
    for row in tqdm(rows, desc=source, unit="row", delay=2, leave=False, disable=quiet):
        if isinstance(row.result, Sample):
            samples.append(row.result)
            if len(samples) == limit:
                break
        elif isinstance(row.result, FilteredOut):
            filtered.append(str(row))
        else:
            bad.append(str(row))
            if on_bad == "error":
                raise UserError(f"{bad[0]}. Fix the row, or skip such rows (on_bad=skip, --on_bad_sample skip)")
            samples.skipped.append((row.number, str(row.result)))
            samples.where[row.number] = where_of(row.file, row.position)
    total = len(samples) + len(bad) + len(filtered)
    if not samples:
        first = "; ".join([*bad[:3], *filtered[:1]]) or "it has no rows"
        raise UserError(f"{source}: no usable row among {total}. {first}")
    if filtered:
        log.info("filtered out %d of %d rows, the first: %s", len(filtered), total, filtered[0])
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
    """Every row of a source, parsed and with its images checked, one at a time; earlier rows are not kept.

    Args:
        columns, row_filter, first_rows: as for `load_samples`.
        stream: of a hub id, fetch only what is read, as with `first_rows`.

    Raises:
        UserError: nothing there, not readable, or wrong columns. What is wrong with a row is in its `RowResult`.
    """
    number = 0
    files = find_files(str(source), split, stream=stream or first_rows is not None)
    with ThreadPoolExecutor(max_workers=8) as pool:  # decoders release the interpreter lock
        for file in files:
            for batch in read_rows(file, columns.select):
                batch = batch if first_rows is None else batch[: first_rows - number]
                parse = partial(_parse, file=file, columns=columns, row_filter=row_filter)
                yield from pool.map(parse, batch, range(number, number + len(batch)))
                number += len(batch)
                if number == first_rows:
                    return


def _parse(row: RawRow, number: int, file: DataFile, columns: Columns, row_filter: RowFilter) -> RowResult:
    result: Sample | InvalidRow | FilteredOut
    try:
        sample = parse_row(row.mapping(), columns=columns, row_filter=row_filter, folder=file.folder)
        result = dataclasses.replace(sample, row=number, source=file.name, position=row.position)
    except (InvalidRow, FilteredOut) as problem:
        result = problem
    return RowResult(number, row.position, file.name, result)


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
