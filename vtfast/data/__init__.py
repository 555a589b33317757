"""Rows of data sets -> questions: where they lie, what their columns mean, which can be used."""

from typing import TYPE_CHECKING, Any

from vtfast.data.columns import AUTO_COLUMNS, Columns
from vtfast.data.loading import RowResult, Samples, iter_rows, load_samples, shuffle_options
from vtfast.data.row_parser import FilteredOut, InvalidRow, RowFilter, Sample, parse_row
from vtfast.data.sample import question_kind

if TYPE_CHECKING:
    from vtfast.data.processor import Processor

__all__ = [
    "AUTO_COLUMNS",
    "Columns",
    "FilteredOut",
    "InvalidRow",
    "Processor",
    "RowFilter",
    "RowResult",
    "Sample",
    "Samples",
    "iter_rows",
    "load_samples",
    "parse_row",
    "question_kind",
    "shuffle_options",
]


def __getattr__(name: str) -> Any:
    """`Processor`, which imports torch: reward workers and `--help` do without."""
    if name != "Processor":
        raise AttributeError(name)
    from vtfast.data.processor import Processor

    return Processor
