"""Reflection words, with which a model questions what it has just written, and the step at which they appear.

The words are those that the study counted (aha, check, possibl, verify, wait, yet) and two similar ones. They are
matched as whole words in any case, so `checkered` and `waiter` do not count. A word does not prove reflection: the page
highlights it so that a person can judge.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

WORDS = {
    "aha": ("aha", r"aha"),
    "check": ("check", r"check(?:s|ed|ing)?"),
    "however": ("however", r"however"),
    "let me re-": ("let me re", r"let me re(?:-\w+|assess|check|consider|count|evaluate|examine|read|think|visit)"),
    "possibl": ("possibl", r"possibl[ey]"),
    "verify": ("verif", r"verif(?:y|ies|ied|ying)"),
    "wait": ("wait", r"wait"),
    "yet": ("yet", r"yet"),
}
"""name -> (substring of every match, pattern). Patterns mean the same in Python and in JavaScript."""
PATTERN = rf"\b(?:{'|'.join(pattern for _, pattern in WORDS.values())})\b"
"""Matches any of the words; the page highlights matches."""
THRESHOLD = 0.10
"""Reflection counts as seen from this share of a step's completions with a reflection word."""

_PATTERNS = {name: (letters, re.compile(rf"\b{pattern}\b", re.ASCII)) for name, (letters, pattern) in WORDS.items()}


def count_words(text: str) -> dict[str, int]:
    """How often each word occurs in a completion; words that do not occur are left out."""
    text = text.lower()
    counts = {}
    for name, (letters, pattern) in _PATTERNS.items():
        # Searching the substring is many times faster than the pattern, and mostly finds nothing.
        if letters in text and (times := len(pattern.findall(text))):
            counts[name] = times
    return counts


def first_step(shares: Mapping[int, float]) -> int | None:
    """The first step whose share of completions with a reflection word reaches THRESHOLD."""
    return min((step for step, share in shares.items() if share >= THRESHOLD), default=None)


def in_words(shares: Mapping[int, float]) -> str:
    """A sentence on when reflection was first seen. `shares`: step -> share of completions with a reflection word."""
    if not shares:
        return "No completions, so no reflection words to look for."
    step = first_step(shares)
    if step is None:
        top = max(shares, key=lambda step: shares[step])
        most = f"the most is {shares[top]:.1%} at step {top}" if shares[top] else "no word at all"
        return f"None seen: no step reaches {THRESHOLD:.0%} of its completions ({most})."
    first = min(shares)
    seen = f"First seen at step {step}: {shares[step]:.1%} of its completions hold a reflection word"
    if step == first:
        return f"{seen}. That is the first step on record, so training did not bring it about."
    return f"{seen} (step {first}: {shares[first]:.1%}; the threshold is {THRESHOLD:.0%})."
