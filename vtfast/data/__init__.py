"""Rows of data sets -> questions: where they lie, what their columns mean, which can be used."""

from typing import TYPE_CHECKING, Any

from vtfast.data.columns import RECOGNISED, Columns
from vtfast.data.loading import Row, Samples, iter_rows, load_samples, shuffle_options
from vtfast.data.rows import BadRow, NotSelected, Sample, Selection, read_row
from vtfast.data.sample import question_kind

if TYPE_CHECKING:
    from vtfast.data.processor import Processor

__all__ = [
    "RECOGNISED",
    "BadRow",
    "Columns",
    "NotSelected",
    "Processor",
    "Row",
    "Sample",
    "Samples",
    "Selection",
    "iter_rows",
    "load_samples",
    "question_kind",
    "read_row",
    "shuffle_options",
]


def __getattr__(name: str) -> Any:
    """`Processor`, which imports torch: reward workers and `--help` do without."""
    if name != "Processor":
        raise AttributeError(name)
    from vtfast.data.processor import Processor

    return Processor
