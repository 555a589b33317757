"""Data: the rows of files become samples, samples become tokenized prompts, prompts become the batches of a step. Start
reading in loading.py for rows -> samples, and in prompt_builder.py for samples -> prompts."""

from typing import TYPE_CHECKING, Any

from vtfast.data.columns import AUTO_COLUMNS, Columns, InvalidRow
from vtfast.data.loading import RowResult, Samples, iter_rows, load_samples, shuffle_options
from vtfast.data.row_parser import FilteredOut, RowFilter, parse_row
from vtfast.data.sample import Sample, question_kind

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
    """`Processor`, which imports torch: reward workers and `--help` do not need it."""
    if name != "Processor":
        raise AttributeError(name)
    from vtfast.data.processor import Processor

    return Processor
