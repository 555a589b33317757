"""Rows of data sets -> questions: where they lie, what their columns mean, which can be used."""

from vtfast.data.columns import RECOGNISED, Columns
from vtfast.data.kinds import question_kind
from vtfast.data.loading import Row, Samples, iter_rows, load_samples, shuffle_options
from vtfast.data.rows import BadRow, NotSelected, Sample, Selection, read_row
from vtfast.processor import Processor

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
