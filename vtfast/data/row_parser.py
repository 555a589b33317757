"""Parses one row of a data set into a `Sample`.

A row either has a question, an answer and images that decode, or it is an `InvalidRow` with a reason.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vtfast.data.columns import AUTO_COLUMNS, MESSAGES, QUESTION_TYPE, Columns, InvalidRow, is_sat
from vtfast.data.images import Images, ImageSource, check_image
from vtfast.data.sample import Sample, question_kind
from vtfast.utils.errors import UserError
from vtfast.utils.text import shorten

LONGEST_TEXT = 1_000_000
"""Characters of one text: far more than any prompt, and few enough to tokenize before its length is known."""


class FilteredOut(Exception):
    """A valid row that a `RowFilter` excludes; the message says why."""


@dataclass(frozen=True)
class RowFilter:
    """Which rows a run uses. The others are no bad rows: they are left out whatever `on_bad_sample` is."""

    static: bool = False
    """Only rows with exactly one image: VisualThinker's rule for SAT's static questions."""
    question_types: tuple[str, ...] | None = None
    """Only rows whose column `question_type` is one of these; None: all."""

    def check(self, images: int, question_type: Any) -> None:
        """Raises FilteredOut, or InvalidRow for a row without the question type that the filter needs."""
        if self.static and images != 1:
            raise FilteredOut(f"{images} images, --static takes rows with one")
        if self.question_types is None:
            return
        if not isinstance(question_type, str):
            raise InvalidRow("no question_type, which --question_types needs")
        if question_type not in self.question_types:
            raise FilteredOut(f"question_type {question_type}")


ALL = RowFilter()


def parse_row(
    row: Any,
    *,
    columns: Columns = AUTO_COLUMNS,
    row_filter: RowFilter = ALL,
    number: int = -1,
    source: str = "",
    position: str = "",
    folder: Path | None = None,
) -> Sample:
    """A sample whose images are known to decode.

    Args:
        row: a mapping of column names to values, of a set that `vtfast.data.columns` lists, or in VisualThinker's
            form (`messages`, `images`).
        number, source, position: of the row, for the sample.
        folder: what relative image paths start from.

    Raises:
        InvalidRow: anything missing, empty, of a wrong type, or not decodable.
        FilteredOut: excluded by `row_filter`. Its images were not looked at.
    """
    if isinstance(row, InvalidRow):  # a line that the file's reader could not read
        raise row
    if not isinstance(row, Mapping):
        raise InvalidRow(f"must be a mapping of columns to values, not {type(row).__name__}")
    question_type = row.get(QUESTION_TYPE)
    if MESSAGES in row and columns == AUTO_COLUMNS:
        images, complete = _as_list(row.get("images")), True
        fields: tuple[Any, Any, Any] = _visualthinker_fields(row[MESSAGES])
    else:
        names = columns.resolve(row)
        images, complete = _as_list(row.get(names.image)), is_sat(columns, names)
        fields = (row.get(names.question), row.get(names.options), row.get(names.answer))
    if not images and complete:
        raise InvalidRow("no image")
    row_filter.check(len(images), question_type)
    question = _text(_IMAGE_MARKS.sub("", _text(fields[0], "question")), "question")
    options = _options(fields[1], required=complete)
    answer = _answer(fields[2], options)
    own_type = question_type if isinstance(question_type, str) else ""
    kind = question_kind(question, own_type)
    return Sample(question, options, answer, _images(images, folder), kind, number, source, own_type, position)


# Other trainers' data mark the images' places in front of the question; here the template has them.
_IMAGE_MARKS = re.compile(r"\A(?:\s*<image>)+\s*")


def _text(value: Any, name: str) -> str:
    if problem := _text_problem(value):
        raise InvalidRow(f"the {name} {problem}")
    return str(value)


def _text_problem(value: Any) -> str | None:
    if not isinstance(value, str):
        return f"is not text but {type(value).__name__}"
    if not value.strip():
        return "is empty"
    if len(value) > LONGEST_TEXT:
        return f"has {len(value)} characters, more than {LONGEST_TEXT}"
    if re.search("[\ud800-\udfff]", value):
        return "holds half of a character (a lone surrogate)"
    if token := re.search(r"<\|\w+\|>", value):  # the tokenizer would encode it as that token
        return f"holds the special token {token[0]}"
    return None


def _options(values: Any, *, required: bool) -> list[str]:
    if not values and isinstance(values, list | tuple | None) and required:
        raise InvalidRow("no options")
    if not isinstance(values, list | tuple | None):
        raise InvalidRow(f"the options are not a list but {type(values).__name__}")
    options = [clean_option(_text(option, "option")) for option in values or ()]
    if not all(options):
        raise InvalidRow("the option is empty")
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
        raise InvalidRow("the answer is empty")
    if options and answer not in options:
        raise InvalidRow(f"the answer {answer[:80]!r} is not among the options {str(options)[:200]}")
    return answer


def _unwrap(text: str) -> str:
    """`<answer> 3 </answer>` -> ` 3 `, and `… so the angle is 40. Answer: B` -> `B`; other text as it is."""
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    lettered = re.search(r"\bAnswer:\s*([A-Z])\.?\s*\Z", text)
    return tagged[-1] if tagged else lettered[1] if lettered else text


def clean_option(text: str) -> str:
    """An option without words that SAT's generator left in some by mistake."""
    return text.replace("in the first frame", "").strip()


def _as_list(value: Any) -> list[Any]:
    """The images of an image column, which holds one, a list of them, or none."""
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def _images(images: Sequence[Any], folder: Path | None) -> Images:
    sources = []
    for number, image in enumerate(images):
        try:
            sources.append(_source(image, folder))
            check_image(sources[-1])
        except UserError as error:
            raise InvalidRow(f"image {number}: {error}") from error
    return Images(sources)


def _source(image: Any, folder: Path | None) -> ImageSource:
    """What an image column holds for one image: bytes, a path, both in a dict, or a PIL image."""
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytearray | memoryview):
        image = bytes(image)
    if isinstance(image, bytes | Image.Image) and image:
        return image
    if not isinstance(image, str | Path) or not str(image):
        raise InvalidRow(f"{type(image).__name__} is not an image" if image else "empty")
    return _image_path(str(image), folder)


def _image_path(name: str, folder: Path | None) -> Path:
    """The file of an image path in the data.

    A relative path starts from the data file's folder or the one above it, and must stay in there. An absolute one is
    used as it is. Data from the hub contain their images: a path there would be one of this machine's files.
    """
    if re.match(r"\w[\w+.-]*://|data:", name):  # http://, s3://, data:image/png;base64
        raise InvalidRow(f"{shorten(name)} is a link, and images are not fetched: give a file, or its bytes")
    if folder is None:
        raise InvalidRow(f"{shorten(name)} is a path, and the data set has no folder")
    if os.path.isabs(name):
        return Path(name)
    top = os.path.abspath(folder.parent)
    if os.path.commonpath([top, os.path.abspath(folder / name)]) != top:
        raise InvalidRow(f"{shorten(name)} leads out of {top}, where the data are: give an absolute path")
    candidates = [folder / name, folder.parent / name]
    return next((path for path in candidates if os.path.exists(path)), candidates[0])


# VisualThinker's user text: "<image> Answer in natural language. Q Choose between … options: a or b"
_USER = re.compile(
    r"(?:\s*<image>)*\s*(?:Answer in natural language\. )?(?P<question>.*)"
    r" Choose between the following options: (?P<options>.*)",
    re.DOTALL,
)


def _visualthinker_fields(messages: Any) -> tuple[str, list[str], str]:
    """Question, options and answer of a user and an assistant message."""
    try:
        texts = {message["role"]: message["content"] for message in messages}
        user, answer = texts["user"], _text(texts["assistant"], "answer")
        match = _USER.fullmatch(user)
    except (TypeError, KeyError) as error:
        raise InvalidRow("messages must be those of a user and an assistant, with text") from error
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
