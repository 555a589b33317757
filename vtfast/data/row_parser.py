"""One row of a data set -> a `Sample`, or what is wrong with it.

Nothing is guessed: a row either has a question, an answer and images that decode, or an `InvalidRow` with a reason.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vtfast.data.columns import AUTO_COLUMNS, MESSAGES, QUESTION_TYPE, Columns, is_sat
from vtfast.data.images import Images, ImageSource, check_image
from vtfast.data.sample import question_kind
from vtfast.utils.errors import UserError
from vtfast.utils.text import shorten


@dataclass
class Sample:
    """One question, about one image, several or none."""

    question: str
    options: list[str]
    """What may be chosen; empty for an open question."""
    answer: str
    """One of the options, word for word; for an open question the answer itself, a number or an expression often."""
    images: Sequence[Image.Image]
    """Decoded on every access where they come from files; a list of PIL images does as well. Empty: text alone."""
    kind: str = ""
    """count, relation, depth, distance, or the data set's own question type."""
    row: int = -1
    """Number in the source, from 0; -1 for none."""
    source: str = ""
    """File the row came from."""
    question_type: str = ""
    """The data set's own type, as it is; empty where it has none."""
    place: str = ""
    """In its file, as messages call it: `line 3` or `row 2 (counted from 0)`."""

    @property
    def where(self) -> str:
        """File and place in it, for messages."""
        return where_of(self.source, self.place or f"row {self.row} (counted from 0)")

    def __post_init__(self) -> None:
        self.kind = self.kind or question_kind(self.question)


def where_of(source: str, place: str) -> str:
    """A row's file without the folders above it, which the run's settings name, and its place in that."""
    return f"{os.path.basename(source)}, {place}" if source else place


LONGEST_TEXT = 1_000_000
"""Characters of one text: far more than any prompt, and little enough to tokenize before that is known."""


class InvalidRow(UserError):
    """A row that cannot be used; the message says why."""


class FilteredOut(Exception):
    """A sound row that the run does not want; the message says why."""


@dataclass(frozen=True)
class RowFilter:
    """Which rows a run wants. A row outside of it is no bad row: it is left out whatever `on_bad_sample` says."""

    static: bool = False
    """Only rows with exactly one image: VisualThinker's rule for SAT's static questions."""
    question_types: tuple[str, ...] | None = None
    """Only rows whose column `question_type` is one of these; None: all."""

    def check(self, images: int, question_type: Any) -> None:
        """Raises FilteredOut, or InvalidRow where a question type is asked for and there is none."""
        if self.static and images != 1:
            raise FilteredOut(f"{images} images, and --static wants one")
        if self.question_types is None:
            return
        if not isinstance(question_type, str):
            raise InvalidRow("no question_type, which --question_types goes by")
        if question_type not in self.question_types:
            raise FilteredOut(f"question_type {question_type}")


ALL = RowFilter()


def parse_row(
    entry: Any,
    *,
    columns: Columns = AUTO_COLUMNS,
    row_filter: RowFilter = ALL,
    row: int = -1,
    source: str = "",
    place: str = "",
    folder: Path | None = None,
) -> Sample:
    """A sample whose images are known to decode.

    Args:
        entry: a mapping of column names to values, of a set that `vtfast.data.columns` lists, or in VisualThinker's
            form (`messages`, `images`).
        folder: what relative image paths start from.

    Raises:
        InvalidRow: anything missing, empty, of a wrong type, or not decodable.
        FilteredOut: sound so far, but outside of `row_filter`. Its images were not looked at.
    """
    if isinstance(entry, InvalidRow):  # a line that its file's reader could not read
        raise entry
    if not isinstance(entry, Mapping):
        raise InvalidRow(f"not a row of named values but {type(entry).__name__}")
    question_type = entry.get(QUESTION_TYPE)
    if MESSAGES in entry and columns == AUTO_COLUMNS:
        items, complete = _items(entry.get("images")), True
        question, options, answer = _visualthinker_texts(entry[MESSAGES])
    else:
        try:
            names = columns.resolve(entry)
        except UserError as error:
            raise InvalidRow(str(error)) from None
        items, complete = _items(entry.get(names.image)), is_sat(columns, names)
        question, options, answer = (entry.get(name) for name in (names.question, names.options, names.answer))
    if not items and complete:
        raise InvalidRow("no image")
    row_filter.check(len(items), question_type)
    question = _text(_IMAGE_MARKS.sub("", _text(question, "question")), "question")
    options = _options(options, required=complete)
    answer = _answer(answer, options)
    own = question_type if isinstance(question_type, str) else ""
    kind = question_kind(question, own)
    return Sample(question, options, answer, _images(items, folder), kind, row, source, own, place)


# What other trainers' data puts in front of a question to say where the images go; here the template says that.
_IMAGE_MARKS = re.compile(r"\A(?:\s*<image>)+\s*")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise InvalidRow(f"the {name} is not text but {type(value).__name__}")
    if not value.strip():
        raise InvalidRow(f"empty {name}")
    if len(value) > LONGEST_TEXT:
        raise InvalidRow(f"the {name} has {len(value)} characters, more than {LONGEST_TEXT}")
    if re.search("[\ud800-\udfff]", value):
        raise InvalidRow(f"the {name} holds half of a character (a lone surrogate)")
    mark = re.search(r"<\|\w+\|>", value)
    if mark:  # the tokenizer would take it for the real thing
        raise InvalidRow(f"the {name} holds the special token {mark[0]}")
    return value


def _options(values: Any, *, required: bool) -> list[str]:
    if values is None and not required:
        return []
    if not isinstance(values, list | tuple):
        kind = "" if values is None else f": not a list but {type(values).__name__}"
        raise InvalidRow(f"no options{kind}")
    if not values and required:
        raise InvalidRow("no options")
    options = [clean_option(_text(option, "option")) for option in values]
    if not all(options):
        raise InvalidRow("empty option")
    return options


def _answer(value: Any, options: Sequence[str]) -> str:
    """The bare answer, one of the options if there are any."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidRow(f"the answer is {value}")
        value = str(value)
        if not options:
            return value
    answer = clean_option(_unwrap(_text(value, "answer")))
    if not answer:
        raise InvalidRow("empty answer")
    if options and answer not in options:
        raise InvalidRow(f"the answer {answer[:80]!r} is not among the options {str(options)[:200]}")
    return answer


def _unwrap(text: str) -> str:
    """`<answer> 3 </answer>` -> ` 3 `, and `… so the angle is 40. Answer: B` -> `B`; other text as it is."""
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    lettered = re.search(r"\bAnswer:\s*([A-Z])\.?\s*\Z", text)
    return tagged[-1] if tagged else lettered[1] if lettered else text


def clean_option(text: str) -> str:
    """An option without the words that SAT's generator left in some by mistake."""
    return text.replace("in the first frame", "").strip()


def _items(value: Any) -> list[Any]:
    """The entries of an image column: one, a list of them, or none."""
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def _images(items: Sequence[Any], folder: Path | None) -> Images:
    sources = []
    for number, item in enumerate(items):
        try:
            sources.append(_source(item, folder))
            check_image(sources[-1])
        except UserError as error:
            raise InvalidRow(f"image {number}: {error}") from error
    return Images(sources)


def _source(item: Any, folder: Path | None) -> ImageSource:
    """What one entry of an image column holds: bytes, a path, both in a dict, or a PIL image."""
    if isinstance(item, Mapping):
        item = item.get("bytes") or item.get("path")
    if isinstance(item, bytearray | memoryview):
        item = bytes(item)
    if isinstance(item, bytes | Image.Image) and item:
        return item
    if not isinstance(item, str | Path) or not str(item):
        raise InvalidRow("empty" if item is None or not item else f"{type(item).__name__} is no image")
    return _placed(str(item), folder)


def _placed(name: str, folder: Path | None) -> Path:
    """The file that a path in the data means.

    A relative path starts from the data file's folder or from the one above it, and stays in there. An absolute one is
    taken as it is. Data from the hub hold their images themselves: there a path would be one of this machine's files.
    """
    shown = shorten(name)
    if re.match(r"\w[\w+.-]*://|data:", name):  # http://, s3://, data:image/png;base64
        raise InvalidRow(f"{shown} is a link, and images are not fetched: give a file, or its bytes")
    if folder is None:
        raise InvalidRow(f"{shown} is a path, and the data set has no folder")
    if os.path.isabs(name):
        return Path(name)
    top = os.path.abspath(folder.parent)
    if os.path.commonpath([top, os.path.abspath(folder / name)]) != top:
        raise InvalidRow(f"{shown} leads out of {top}, where the data are: give an absolute path")
    tried = [folder / name, folder.parent / name]
    return next((path for path in tried if os.path.exists(path)), tried[0])


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
        raise InvalidRow("messages of a user and an assistant with text are wanted") from error
    if not match:
        raise InvalidRow(f"no 'Choose between the following options:' in {user[:200]!r}")
    return match["question"], _split_options(match["options"], answer), answer


def _split_options(text: str, answer: str) -> list[str]:
    """`a, b or c` -> [a, b, c]. An option may hold " or " itself: the answer tells which one."""
    for cut in reversed([found.start() for found in re.finditer(" or ", text)]):
        options = [*text[:cut].split(", "), text[cut + len(" or ") :]]
        if answer in options:
            return options
    return [text]
