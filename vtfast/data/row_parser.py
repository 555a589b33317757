"""Parses one row of a data set into a `Sample`.

A row either has a question, an answer and images that decode, or it is an `InvalidRow` with a reason.
"""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vtfast.data.columns import AUTO_COLUMNS, MESSAGES, QUESTION_TYPE, Columns, InvalidRow, is_sat
from vtfast.data.images import Images, ImageSource, check_image
from vtfast.data.sample import Sample, question_kind
from vtfast.utils.errors import error_prefix
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
        if self.question_types is None or question_type in self.question_types:
            return
        if not isinstance(question_type, str):
            raise InvalidRow("no question_type, which --question_types needs")
        raise FilteredOut(f"question_type {question_type}")


ALL = RowFilter()


def parse_row(
    row: Mapping[Any, Any], *, columns: Columns = AUTO_COLUMNS, row_filter: RowFilter = ALL, folder: Path | None = None
) -> Sample:
    """A sample whose images are known to decode.

    Args:
        row: a mapping of column names to values, of a set that `vtfast.data.columns` lists, or in VisualThinker's
            form (`messages`, `images`).
        folder: what relative image paths start from.

    Raises:
        InvalidRow: anything missing, empty, of a wrong type, or not decodable.
        FilteredOut: excluded by `row_filter`. Its images were not looked at.
    """
    if MESSAGES in row and columns == AUTO_COLUMNS:
        images, complete = _as_list(row.get("images")), True
        question, options, answer = _visualthinker_fields(row[MESSAGES])
    else:
        names = columns.resolve(row)
        images, complete = _as_list(row.get(names.image)), is_sat(columns, names)
        question, options, answer = (row.get(name) for name in (names.question, names.options, names.answer))
    if complete and not images:
        raise InvalidRow("no image")
    question_type = row.get(QUESTION_TYPE)
    row_filter.check(len(images), question_type)
    question = _clean(question, lambda text: _IMAGE_MARKS.sub("", text))
    if type(answer) is int or (type(answer) is float and math.isfinite(answer)):
        answer = str(answer)
    answer = _clean(answer, lambda text: clean_option(_unwrap(text)))
    if isinstance(options, list | tuple):
        options = [_clean(option, clean_option) for option in options]
    if problem := _problem(question, options, answer, complete):
        raise InvalidRow(problem)
    own_type = question_type if isinstance(question_type, str) else ""
    kind = question_kind(question, own_type)
    return Sample(question, options or [], answer, _images(images, folder), kind, question_type=own_type)


# Other trainers' data mark the images' places in front of the question; here the template has them.
_IMAGE_MARKS = re.compile(r"\A(?:\s*<image>)+\s*")


def _clean(value: Any, clean: Callable[[str], str]) -> Any:
    """A text, cleaned; anything else, which `_problem` refuses, as it is."""
    return clean(value) if isinstance(value, str) else value


def _problem(question: Any, options: Any, answer: Any, options_required: bool) -> str | None:
    """Why a row with these fields cannot be used."""
    if options_required and options in (None, []):
        return "no options"
    if not isinstance(options, list | None):
        return f"the options are not a list but {type(options).__name__}"
    for name, value in (("question", question), *(("option", option) for option in options or ()), ("answer", answer)):
        if problem := _text_problem(value):
            return f"the {name} {problem}"
    if options and answer not in options:
        return f"the answer {answer[:80]!r} is not among the options {str(options)[:200]}"
    return None


def _text_problem(value: Any) -> str | None:
    if not isinstance(value, str):
        return f"is {shorten(repr(value), 60)}, not text"
    if not value.strip():
        return "is empty"
    if len(value) > LONGEST_TEXT:
        return f"has {len(value)} characters, more than {LONGEST_TEXT}"
    if re.search("[\ud800-\udfff]", value):
        return "holds half of a character (a lone surrogate)"
    if token := re.search(r"<\|\w+\|>", value):  # the tokenizer would encode it as that token
        return f"holds the special token {token[0]}"
    return None


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
        with error_prefix(f"image {number}", InvalidRow):
            sources.append(_source(image, folder))
            check_image(sources[-1])
    return Images(sources)


def _source(image: Any, folder: Path | None) -> ImageSource:
    """What an image column holds for one image: bytes, a path, both in a dict, or a PIL image."""
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytearray | memoryview):
        image = bytes(image)
    if isinstance(image, bytes | Image.Image) and image:
        return image
    if isinstance(image, str | Path) and str(image):
        return _image_path(str(image), folder)
    raise InvalidRow(f"{type(image).__name__} is not an image" if image else "empty")


def _image_path(name: str, folder: Path | None) -> Path:
    """The file of an image path in the data.

    A relative path starts from the data file's folder or the one above it, and must stay in there. An absolute one is
    used as it is. Data from the hub contain their images: a path there would be one of this machine's files.
    """
    if re.match(r"\w[\w+.-]*://|data:", name):  # http://, s3://, data:image/png;base64
        problem = "is a link, and images are not fetched: give a file, or its bytes"
    elif folder is None:
        problem = "is a path, and the data set has no folder"
    elif os.path.isabs(name):
        return Path(name)
    else:
        top = os.path.abspath(folder.parent)
        if os.path.commonpath([top, os.path.abspath(folder / name)]) == top:
            candidates = [folder / name, folder.parent / name]
            return next((path for path in candidates if os.path.exists(path)), candidates[0])
        problem = f"leads out of {top}, where the data are: give an absolute path"
    raise InvalidRow(f"{shorten(name)} {problem}")


# VisualThinker's user text: "<image> Answer in natural language. Q Choose between … options: a or b"
_USER = re.compile(
    r"(?:\s*<image>)*\s*(?:Answer in natural language\. )?(?P<question>.*)"
    r" Choose between the following options: (?P<options>.*)",
    re.DOTALL,
)


def _visualthinker_fields(messages: Any) -> tuple[Any, Any, Any]:
    """Question, options and answer of a user and an assistant message."""
    try:
        texts = {message["role"]: message["content"] for message in messages}
        match, answer = _USER.fullmatch(texts["user"]), texts["assistant"]
    except (TypeError, KeyError):
        match = None
    if not match:
        raise InvalidRow(
            "messages must be those of a user, with the text 'Choose between the following options:', and an assistant"
        )
    return match["question"], _split_options(match["options"], answer), answer


def _split_options(text: str, answer: Any) -> list[str]:
    """`a, b or c` -> [a, b, c]. An option may hold " or " itself: the answer tells which one."""
    for cut in reversed([found.start() for found in re.finditer(" or ", text)]):
        options = [*text[:cut].split(", "), text[cut + len(" or ") :]]
        if answer in options:
            return options
    return [text]
