"""What a data set holds, told before a run is spent on it: counts, sizes, prompt lengths, and what is wrong with it.

Rows stream by: of each only a few numbers are kept.
"""

import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from vtfast.config import Config
from vtfast.data import FilteredOut, RowResult, Sample, Samples, iter_rows, shuffle_options
from vtfast.data.images import image_sizes
from vtfast.data.processor import Processor
from vtfast.data.prompt_builder import PromptBuilder
from vtfast.data.splits import columns, row_filter
from vtfast.utils.errors import UserError

SHOWN = 3  # rows that are named for each reason


@dataclass
class DataProblem:
    """Rows with the same thing about them."""

    count: int = 0
    first: list[str] = field(default_factory=list)
    """A few of them, as `file, place: what about it`."""


@dataclass
class DataReport:
    """What `inspect_data` found."""

    source: str
    model: str
    """Whose tokenizer and image sizes the prompt lengths are of."""
    template: str
    max_prompt_length: int
    rows: int = 0
    usable: int = 0
    left_out: dict[str, DataProblem] = field(default_factory=dict)
    """Sound rows that `--static` and `--question_types` leave out, by reason."""
    bad: dict[str, DataProblem] = field(default_factory=dict)
    """Rows that a run would skip, or stop at, by reason."""
    kinds: Counter[str] = field(default_factory=Counter)
    """Questions by what they ask for, as a run's tables call it."""
    question_types: Counter[str] = field(default_factory=Counter)
    """Questions by the data set's own word; empty where it has none."""
    options: Counter[int] = field(default_factory=Counter)
    """Questions by their number of options; 0 is an open question."""
    images: Counter[int] = field(default_factory=Counter)
    """Questions by their number of images."""
    image_width: list[int] = field(default_factory=list)
    """Of every image, in pixels."""
    image_height: list[int] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    """Of every usable question, image tokens counted."""
    prompt: str = ""
    """The first usable question as the model gets it."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, lists of numbers as their summaries."""
        return {name: _plain(value) for name, value in vars(self).items()}

    def __str__(self) -> str:
        """For people, a line a fact."""
        facts = {
            "rows": f"{self.rows}, {self.usable} of them usable",
            "kinds": _counts(self.kinds),
            "question types": _counts(self.question_types),
            "options": _counts(self.options, zero="open"),
            "images": _counts(self.images, zero="text only"),
            "image width": _numbers(self.image_width),
            "image height": _numbers(self.image_height),
            "prompt tokens": _numbers(self.prompt_tokens),
            "counted with": f"{self.model}, template {self.template}",
        }
        lines = [self.source, *(f"  {name:<15} {text}" for name, text in facts.items() if text)]
        for title, found in (("left out", self.left_out), ("bad rows", self.bad)):
            for reason, problem in _sorted(found):
                lines += ["", f"{title}: {problem.count} x {reason}"]
                lines += [f"  {row}" for row in problem.first]
        if self.prompt:
            lines += ["", "first prompt:", self.prompt]
        return "\n".join(lines)


def inspect_data(config: Config) -> DataReport:
    """Reads `config.data` as a run with these settings would, and reports instead of skipping or stopping.

    Raises:
        UserError: no such data, model or template, or files that cannot be read at all.
    """
    processor = Processor.from_pretrained(config.model, config.min_pixels, config.max_pixels)
    asker = PromptBuilder(config, processor)
    report = DataReport(config.data, config.model, config.template, config.max_prompt_length)
    rows = iter_rows(
        config.data, config.split, columns=columns(config), row_filter=row_filter(config), first_rows=config.first_rows
    )
    for row in tqdm(rows, desc="rows", unit="row", total=config.first_rows, leave=False, delay=2):
        report.rows += 1
        if isinstance(row.result, Sample):
            [sample] = shuffle_options(Samples([row.result]), config.seed)
            _add(report, row, sample, asker)
        elif isinstance(row.result, FilteredOut):
            _problem(report.left_out, row, str(row.result))
        else:
            _problem(report.bad, row, str(row.result))
    return report


def _add(report: DataReport, row: RowResult, sample: Sample, asker: PromptBuilder) -> None:
    text, sizes = asker.text(sample), image_sizes(sample.images)
    try:
        tokens = asker.processor.prompt_length(text, sizes)
    except UserError as error:  # an image that the pixel limits make too thin
        _problem(report.bad, row, str(error))
        return
    if tokens > asker.max_prompt_length:
        _problem(report.bad, row, f"{tokens} tokens, above --max_prompt_length {asker.max_prompt_length}")
    else:
        report.usable += 1
        report.prompt = report.prompt or text
    report.prompt_tokens.append(tokens)
    report.kinds[sample.kind] += 1
    if sample.question_type:
        report.question_types[sample.question_type] += 1
    report.options[len(sample.options)] += 1
    report.images[len(sizes)] += 1
    report.image_width += [width for width, _ in sizes]
    report.image_height += [height for _, height in sizes]


def _problem(found: dict[str, DataProblem], row: RowResult, reason: str) -> None:
    # What differs from row to row, quoted text, lists, paths and numbers, does not make another reason.
    general = re.sub(r"\[.*\]|'[^']*'|\"[^\"]*\"|\S*/\S*|\d+", "…", reason, flags=re.DOTALL)
    problem = found.setdefault(general, DataProblem())
    problem.count += 1
    if len(problem.first) < SHOWN:
        problem.first.append(f"{row.file}, {row.position}: {reason}")


def _plain(value: Any) -> Any:
    if isinstance(value, Counter):
        return {str(key): count for key, count in sorted(value.items())}
    if isinstance(value, dict):
        return [{"reason": reason, **vars(problem)} for reason, problem in _sorted(value)]
    return summary(value) if isinstance(value, list) else value


def _sorted(found: Mapping[str, DataProblem]) -> list[tuple[str, DataProblem]]:
    return sorted(found.items(), key=lambda item: -item[1].count)


def summary(numbers: Iterable[int]) -> dict[str, float] | None:
    """min, median, p95 (the smallest number that 95% do not exceed) and max; None of nothing."""
    ordered: Sequence[int] = sorted(numbers)
    if not ordered:
        return None
    p95 = ordered[math.ceil(0.95 * len(ordered)) - 1]
    return {"min": ordered[0], "median": statistics.median(ordered), "p95": p95, "max": ordered[-1]}


def _numbers(numbers: Iterable[int]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in (summary(numbers) or {}).items())


def _counts(counts: Counter, zero: str = "") -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], str(item[0])))
    return ", ".join(f"{zero if key == 0 else key}: {count}" for key, count in ordered)
