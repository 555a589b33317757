"""Questions about images: SAT as it is published, its mirror, and what VisualThinker makes of it.

`load_samples` reads whatever of these a path or hub id holds. A row that cannot be used is skipped
and reported with its number; rows count from 0, in file order, over all files of the split.
"""

import dataclasses
import logging
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from vtfast.data_files import DataFile, find_files, read_rows
from vtfast.errors import UserError
from vtfast.images import Images, Source, check_image
from vtfast.processor import Processor

__all__ = ["Processor", "Sample", "Samples", "load_samples", "question_kind", "shuffle_options"]

log = logging.getLogger("vtfast")


@dataclass
class Sample:
    """One question about one or more images."""

    question: str
    options: list[str]
    answer: str
    """One of the options, word for word."""
    images: Sequence[Image.Image]
    """Decoded on every access where they come from files; a list of PIL images does as well."""
    kind: str = ""
    """count, relation, depth, distance, or the data set's own question type."""
    row: int = -1
    """Number in the source, from 0; -1 for none."""
    source: str = ""
    """File the row came from."""

    def __post_init__(self) -> None:
        self.kind = self.kind or question_kind(self.question)


class Samples(list[Sample]):
    """The usable rows of a source, and which ones were not."""

    def __init__(
        self,
        samples: Iterable[Sample] = (),
        skipped: Iterable[tuple[int, str]] = (),
        source: str = "",
    ) -> None:
        super().__init__(samples)
        self.skipped = list(skipped)
        """(row number, reason) of every row that was left out."""
        self.source = source


class BadRow(UserError):
    """A row that cannot be used; the message says why."""


def load_samples(
    source: str | Path,
    split: str | None = None,
    limit: int | None = None,
    *,
    on_bad: Literal["skip", "error"] = "skip",
) -> Samples:
    """The questions of a data set, in file order.

    Args:
        source: a parquet file or folder of such files in the schema of `array/SAT` (`image_bytes`)
            or `array/SAT-v2` (`images`), VisualThinker's JSON, or a hub id such as `array/SAT`.
        split: which files of a folder or hub id, told by their names; "train" where None.
        limit: stop behind this many usable rows, reading no further. On the hub, only what is
            read is fetched then; without a limit, whole files are downloaded once and kept.
        on_bad: "skip" leaves unusable rows out, into `.skipped` and one logged warning; "error"
            stops at the first.

    Raises:
        UserError: nothing there, not readable, wrong columns, no usable row, or an unusable row
            with on_bad="error".
    """
    source = str(source)
    if on_bad not in ("skip", "error"):
        raise UserError(f"on_bad={on_bad!r}: skip or error is wanted")
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit}: 1 or more is wanted, or none at all")
    samples, reports = Samples(source=source), []
    for row, in_file, file, result in _results(find_files(source, split, stream=limit is not None)):
        if isinstance(result, Sample):
            samples.append(result)
            if len(samples) == limit:
                break
            continue
        reports.append(f"{file.name}, row {in_file}: {result}")
        if on_bad == "error":
            raise UserError(
                f"{reports[0]}. Mend the row, or skip such rows (on_bad=skip, --on_bad_sample skip)"
            )
        samples.skipped.append((row, str(result)))
    if not samples:
        first = "; ".join(reports[:3]) or "it has no rows"
        raise UserError(f"{source}: no usable row among {len(reports)}. {first}")
    if reports:
        total = len(samples) + len(reports)
        more = f"; and {len(reports) - 3} more" if len(reports) > 3 else ""
        log.warning(
            "skipped %d of %d rows: %s%s", len(reports), total, "; ".join(reports[:3]), more
        )
    return samples


def _results(files: Iterable[DataFile]) -> Iterator[tuple[int, int, DataFile, "Sample | BadRow"]]:
    """Every row, read and its images checked: (number, number in its file, file, sample or what is wrong)."""
    row = 0
    with ThreadPoolExecutor(max_workers=8) as pool:  # decoders leave the interpreter lock alone
        for file in files:
            first = row
            for batch in read_rows(file):
                numbers = range(row, row + len(batch))
                read = pool.map(
                    lambda entry, number, f=file: _try(entry, number, f), batch, numbers
                )
                for number, result in zip(numbers, read, strict=True):
                    yield number, number - first, file, result
                row += len(batch)


def _try(entry: Any, row: int, file: DataFile) -> "Sample | BadRow":
    try:
        return read_row(entry, row=row, source=file.name, folder=file.folder)
    except BadRow as error:
        return error


def read_row(entry: Any, *, row: int = -1, source: str = "", folder: Path | None = None) -> Sample:
    """One row of any known schema -> a sample whose images are known to decode.

    Args:
        folder: what relative image paths start from.

    Raises:
        BadRow: anything missing, empty, of a wrong type, or not decodable.
    """
    if not isinstance(entry, Mapping):
        raise BadRow(f"not a row of named values but {type(entry).__name__}")
    if "messages" in entry:
        question, options, answer = _visualthinker_texts(entry["messages"])
        images, kind = entry.get("images"), None
    else:
        question, options = entry.get("question"), entry.get("answers")
        answer, kind = entry.get("correct_answer"), entry.get("question_type")
        images = entry.get("image_bytes", entry.get("images"))
    question = _text(question, "question")
    if not isinstance(options, list | tuple) or not options:
        raise BadRow("no options")
    options = [_clean(_text(option, "option")) for option in options]
    answer = _clean(_text(answer, "answer"))
    if not all(options):
        raise BadRow("empty option")
    if answer not in options:
        raise BadRow(f"the answer {answer[:80]!r} is not among the options {str(options)[:200]}")
    kind = question_kind(question, kind if isinstance(kind, str) else None)
    return Sample(question, options, answer, _images(images, folder), kind, row, source)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"the {name} is not text but {type(value).__name__}")
    if not value.strip():
        raise BadRow(f"empty {name}")
    mark = re.search(r"<\|\w+\|>", value)
    if mark:  # the tokenizer would take it for the real thing
        raise BadRow(f"the {name} holds the special token {mark[0]}")
    return value


def _clean(text: str) -> str:
    """An option without the words that SAT's generator left in some by mistake."""
    return text.replace("in the first frame", "").strip()


def _images(items: Any, folder: Path | None) -> Images:
    items = items if isinstance(items, list | tuple) else [] if items is None else [items]
    if not items:
        raise BadRow("no image")
    sources = []
    for number, item in enumerate(items):
        try:
            sources.append(_source(item, folder))
            check_image(sources[-1])
        except UserError as error:
            raise BadRow(f"image {number}: {error}") from error
    return Images(sources)


def _source(item: Any, folder: Path | None) -> Source:
    """What one entry of an image column holds: bytes, a path, both in a dict, or a PIL image."""
    if isinstance(item, Mapping):
        item = item.get("bytes") or item.get("path")
    if isinstance(item, bytearray | memoryview):
        item = bytes(item)
    if isinstance(item, bytes | Image.Image) and item:
        return item
    if not isinstance(item, str | Path) or not str(item):
        raise BadRow("empty" if item is None or not item else f"{type(item).__name__} is no image")
    if folder is None and not Path(item).is_absolute():
        raise BadRow(f"{item} is a path, and the data set has no folder")
    tried = [base / item for base in ([folder, folder.parent] if folder else [Path()])]
    return next((path for path in tried if path.is_file()), tried[0])


# VisualThinker's user text: "<image> Answer in natural language. Q Choose between … options: a or b"
_USER = re.compile(
    r"(?:\s*<image>)*\s*(?:Answer in natural language\. )?(?P<question>.*)"
    r" Choose between the following options: (?P<options>.*)",
    re.DOTALL,
)


def _visualthinker_texts(messages: Any) -> tuple[str, list[str], str]:
    """-> question, options, answer out of a user and an assistant message."""
    try:
        texts = {message["role"]: message["content"] for message in messages}
        user, answer = texts["user"], _text(texts["assistant"], "answer")
        match = _USER.fullmatch(user)
    except (TypeError, KeyError) as error:
        raise BadRow("messages of a user and an assistant with text are wanted") from error
    if not match:
        raise BadRow(f"no 'Choose between the following options:' in {user[:200]!r}")
    return match["question"], _split_options(match["options"], answer), answer


def _split_options(text: str, answer: str) -> list[str]:
    """`a, b or c` -> [a, b, c]. An option may hold " or " itself: the answer tells which one."""
    for cut in reversed([found.start() for found in re.finditer(" or ", text)]):
        options = [*text[:cut].split(", "), text[cut + len(" or ") :]]
        if answer in options:
            return options
    return [text]


_KINDS = (  # first match wins; texts are SAT's generator's and CV-Bench's
    ("count", r"\bhow many\b"),
    ("relation", r"\bconsidering the relative positions\b"),
    ("distance", r"\bdistances?\b"),
    ("depth", r"\bcloser to the camera\b|\bbehind\b|\bin front of\b|\bfurther away\b"),
    ("distance", r"\b(?:closer|closest|nearer|nearest) to\b"),
    ("relation", r"\b(?:left|right) of\b|\babove\b|\bbelow\b|\bwith respect to\b"),
)


def question_kind(question: str, question_type: str | None = None) -> str:
    """count, relation, depth or distance by the question's words, or the data set's own type.

    SAT calls all its static questions `other`; for those, and where there is no type, the words
    decide, with `other` for none of the four.
    """
    if question_type and question_type != "other":
        return question_type
    text = question.casefold()
    return next((kind for kind, words in _KINDS if re.search(words, text)), "other")


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
    return Samples(shuffled, samples.skipped, samples.source)
