"""The strict rewards: they reward only right answers, and no answer that merely resembles one.

They differ from VisualThinker's rewards (`visualthinker.py`) on purpose, as follows:

    the last `<answer>…</answer>` counts        the original reads the first one, or without tags the whole response
    an answer may span lines                    the original does not see such a tag
    case, white space, outer punctuation        do not count; the original compares letter by letter
    numbers are read inside the tag alone       the original looks for them in the thinking too
    an answer with several options scores 0     the original takes the last letter or number
    the format's tags occur once each           the original accepts any number of them inside
    white space around the format is allowed    the original gives 0 for a line feed at the end

A sample without options asks an open question. If the right answer is a number, a quantity or a formula, the answer is
compared as mathematics (`math_answers.py`), else as text.
"""

import re
import string

from vtfast.data import Sample
from vtfast.rewards.math_answers import AMBIGUOUS_WORDS, is_math, math_equal, math_verify
from vtfast.rewards.reward import zero_on_error

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_SHAPE = re.compile(r"<think>.*</think>\s*<answer>.*</answer>", re.DOTALL)
# Stripped around an answer. Signs and decimal points of numbers carry meaning: `-3` is not `3`.
AROUND = string.whitespace + "!\"'()*,.:;?[]_`{|}~“”‘’«»…。，"
_NUMBER = re.compile(r"[+-]?(?=\.?\d)(?:\d{1,3}(?:,\d{3})+|\d*)(?:\.\d+)?")
_NUMERALS = re.compile(r"\d+(?:[.,]\d+)*")
# Plain arithmetic. Powers and factorials stay out: sympy would compute 9^9^9, and no time limit
# stops it there.
_ARITHMETIC = re.compile(r"(?:\\(?:[dt]?frac|boxed|times|div|cdot|left|right)|[\d.,+\-/(){}$ ]|(?<!\*)\*(?!\*))+")
_TWO_NUMBERS = re.compile(r"\d\s+\d|,\s|\d\s*-\s*\d")
_LONGEST_NUMBER = 64


def _last_answer(completion: str) -> str | None:
    """Inside of the last complete `<answer>…</answer>`."""
    end = completion.rfind("</answer>")
    start = completion.rfind("<answer>", 0, max(end, 0))
    return completion[start + len("<answer>") : end] if start >= 0 else None


def _bare(text: str, around: str) -> str:
    """Text in one case without the characters around it; the point of a leading `.5` stays."""
    bare = text.casefold().strip(around)
    return "." + bare if re.match(r"[^\w+-]*\.\d", text) else bare


def _normalise(text: str) -> str:
    return _bare(" ".join(text.split()), AROUND)


def _same_number(inside: str, sample: Sample) -> bool:
    """Whether an answer that is not the gold text is the gold number: `3.0`, `6/2`, `3 chairs`."""
    gold = _normalise(sample.answer)
    text = _bare(inside, string.whitespace + ".,:;!?*_`\"'").removeprefix("+")
    numerals = _NUMERALS.findall(text)
    if not _NUMBER.fullmatch(gold) or not numerals or len(text) > _LONGEST_NUMBER:
        return False
    if text == gold:
        return True
    if text in {_normalise(option) for option in sample.options} or AMBIGUOUS_WORDS.search(text):
        return False  # another option, or several
    if len(numerals) > 1 or "\\" in text:
        if not _ARITHMETIC.fullmatch(text) or _TWO_NUMBERS.search(text):
            return False
    elif "^" in text or "!" in text:
        return False
    return math_verify(gold, text, seconds=None)  # the guards above keep the inputs tiny


@zero_on_error
def accuracy_reward(completion: str, sample: Sample) -> float:
    """1.0 if the last `<answer>…</answer>` is the right option, else 0.0.

    Case, white space and surrounding punctuation do not count. Where the right answer is a number,
    an equal number written otherwise is right too. An answer naming several options (`left or
    right`) is wrong.
    """
    inside = _last_answer(completion)
    if inside is None:
        return 0.0
    if has_math_answer(sample):
        return float(math_equal(inside, sample.answer))
    answer, gold = _normalise(inside), _normalise(sample.answer)
    if not gold:  # the right answer is punctuation only
        return float(inside.strip() == sample.answer.strip())
    return float(answer == gold or _same_number(inside, sample))


def has_math_answer(sample: Sample) -> bool:
    """Whether the question has no options and a number, a quantity or a formula for an answer."""
    return not sample.options and is_math(sample.answer)


@zero_on_error
def format_reward(completion: str, sample: Sample) -> float:
    """1.0 if the response is `<think>…</think> <answer>…</answer>` and nothing else, else 0.0.

    Each tag occurs once. A leading `<think>` that the prompt already wrote may be missing; white
    space around the whole does not count.
    """
    response = completion.strip()
    if not response.startswith("<think>"):
        response = "<think>" + response
    once = all(response.count(tag) == 1 for tag in _TAGS)
    return float(once and _SHAPE.fullmatch(response) is not None)


@zero_on_error
def length_reward(completion: str, sample: Sample, *, tokens: int | None = None) -> float:
    """0.001 for every token of the response.

    Args:
        tokens: number of tokens sampled. Without it, words between white space are counted
            instead: fewer than tokens, by about a quarter in English prose.
    """
    return 0.001 * (len(completion.split()) if tokens is None else tokens)
