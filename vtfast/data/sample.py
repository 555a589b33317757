"""What a question asks for, told by its words."""

import re

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
