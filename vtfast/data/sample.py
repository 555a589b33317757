"""A question with its options, answer and images, and what kind of question it is."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

_KINDS = (  # first match wins; texts are SAT's generator's and CV-Bench's
    ("count", r"\bhow many\b"),
    ("relation", r"\bconsidering the relative positions\b"),
    ("distance", r"\bdistances?\b"),
    ("depth", r"\bcloser to the camera\b|\bbehind\b|\bin front of\b|\bfurther away\b"),
    ("distance", r"\b(?:closer|closest|nearer|nearest) to\b"),
    ("relation", r"\b(?:left|right) of\b|\babove\b|\bbelow\b|\bwith respect to\b"),
)


def question_kind(question: str, question_type: str | None = None) -> str:
    """The data set's own type; count, relation, depth, distance or other by the question's words if that is missing or
    `other`, as SAT calls all its static questions."""
    if question_type and question_type != "other":
        return question_type
    text = question.casefold()
    return next((kind for kind, words in _KINDS if re.search(words, text)), "other")


@dataclass
class Sample:
    """One question, about any number of images."""

    question: str
    options: list[str]
    """Empty for an open question."""
    answer: str
    """One of the options, word for word; for an open question the answer itself, often a number or an expression."""
    images: Sequence[Image.Image]
    """Decoded on every access if they come from files. Empty for a text-only question."""
    kind: str = ""
    """count, relation, depth, distance, or the data set's own question type."""
    row: int = -1
    """Number in the source, from 0; -1 if it has none."""
    source: str = ""
    """File that the row came from."""
    question_type: str = ""
    """The data set's own type; empty if it has none."""
    position: str = ""
    """In its file, for messages: `line 3` or `row 2 (counted from 0)`."""

    @property
    def where(self) -> str:
        """File and position in it, for messages."""
        return where_of(self.source, self.position or f"row {self.row} (counted from 0)")

    def __post_init__(self) -> None:
        self.kind = self.kind or question_kind(self.question)


def where_of(source: str, position: str) -> str:
    """A row's file name, without folders (the run's settings have them), and its position in the file."""
    return f"{os.path.basename(source)}, {position}" if source else position
