"""Rewards: `(completion, sample) -> float`, one number per sampled response.

`completion` is what the model wrote behind the prompt; a prompt that ends with `<think>` leaves
that tag out of it. A reward never raises on any completion: a broken response is worth 0. Recipes
choose rewards by name, or by `module:function` for one's own; the trainer adds up what they return.

This is the strict default. It differs from VisualThinker's code where that code rewards by
accident: only the last `<answer>` counts and never the thinking, an answer may span lines, and
naming several options earns nothing.
"""

import difflib
import functools
import importlib
import inspect
import logging
import math
import re
import string
from collections.abc import Callable
from typing import TYPE_CHECKING

from vtfast.errors import UserError

if TYPE_CHECKING:
    from vtfast.data import Sample

Reward = Callable[[str, "Sample"], float]

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_SHAPE = re.compile(r"<think>.*</think>\s*<answer>.*</answer>", re.DOTALL)
# Stripped around an answer. Signs and decimal points of numbers carry meaning: `-3` is not `3`.
_AROUND = string.whitespace + "!\"'()*,.:;?[]_`{|}~“”‘’«»…。，"
_NUMBER = re.compile(r"[+-]?(?=\.?\d)(?:\d{1,3}(?:,\d{3})+|\d*)(?:\.\d+)?")
_NUMERALS = re.compile(r"\d+(?:[.,]\d+)*")
# Words that turn one number into several, or into another one.
_HEDGE = re.compile(
    r"\b(?:or|and|not|no|to|than|least|most|between|about|around|maybe|either|neither|more|less"
    r"|fewer|over|under)\b"
)
# Plain arithmetic. Powers and factorials stay out: sympy would compute 9^9^9, and no time limit
# stops it there.
_ARITHMETIC = re.compile(
    r"(?:\\(?:[dt]?frac|boxed|times|div|cdot|left|right)|[\d.,+\-/(){}$ ]|(?<!\*)\*(?!\*))+"
)
_TWO_NUMBERS = re.compile(r"\d\s+\d|,\s|\d\s*-\s*\d")
_LONGEST_NUMBER = 64


def _never_raises(reward: Reward) -> Reward:
    @functools.wraps(reward)
    def guarded(completion: str, sample: "Sample", **options) -> float:
        try:
            return reward(completion, sample, **options)
        except Exception:  # a training run of days must not end on one odd response
            logging.getLogger("vtfast").debug("%s failed", reward.__name__, exc_info=True)
            return 0.0

    return guarded


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
    return _bare(" ".join(text.split()), _AROUND)


def _same_number(inside: str, sample: "Sample") -> bool:
    """Whether an answer that is not the gold text is the gold number: `3.0`, `6/2`, `3 chairs`."""
    gold = _normalise(sample.answer)
    text = _bare(inside, string.whitespace + ".,:;!?*_`\"'").removeprefix("+")
    numerals = _NUMERALS.findall(text)
    if not _NUMBER.fullmatch(gold) or not numerals or len(text) > _LONGEST_NUMBER:
        return False
    if text == gold:
        return True
    if text in {_normalise(option) for option in sample.options} or _HEDGE.search(text):
        return False  # another option, or several
    if len(numerals) > 1 or "\\" in text:
        if not _ARITHMETIC.fullmatch(text) or _TWO_NUMBERS.search(text):
            return False
    elif "^" in text or "!" in text:
        return False
    return _verify(gold, text)


def _verify(gold: str, answer: str) -> bool:
    # Imported late: it brings sympy, and most answers never get here.
    from math_verify import parse, verify

    # No time limits: they are signals, which only a main thread may set, and the guards above keep
    # the inputs tiny. The library warns about that at every call.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    target = parse(answer, parsing_timeout=None)
    return bool(verify(parse(gold, parsing_timeout=None), target, timeout_seconds=None))


@_never_raises
def accuracy_reward(completion: str, sample: "Sample") -> float:
    """1.0 if the last `<answer>…</answer>` is the right option, else 0.0.

    Case, white space and surrounding punctuation do not count. Where the right answer is a number,
    an equal number written otherwise is right too. An answer naming several options (`left or
    right`) is wrong.
    """
    inside = _last_answer(completion)
    if inside is None:
        return 0.0
    answer, gold = _normalise(inside), _normalise(sample.answer)
    if not gold:  # the right answer is punctuation only
        return float(inside.strip() == sample.answer.strip())
    return float(answer == gold or _same_number(inside, sample))


@_never_raises
def format_reward(completion: str, sample: "Sample") -> float:
    """1.0 if the response is `<think>…</think> <answer>…</answer>` and nothing else, else 0.0.

    Each tag occurs once. A leading `<think>` that the prompt already wrote may be missing; white
    space around the whole does not count.
    """
    response = completion.strip()
    if not response.startswith("<think>"):
        response = "<think>" + response
    once = all(response.count(tag) == 1 for tag in _TAGS)
    return float(once and _SHAPE.fullmatch(response) is not None)


@_never_raises
def length_reward(completion: str, sample: "Sample", *, tokens: int | None = None) -> float:
    """0.001 for every token of the response.

    Args:
        tokens: number of tokens sampled. Without it, words between white space are counted
            instead: fewer than tokens, by about a quarter in English prose.
    """
    return 0.001 * (len(completion.split()) if tokens is None else tokens)


REWARDS: dict[str, Reward] = {
    "accuracy": accuracy_reward,
    "format": format_reward,
    "length": length_reward,
}


def score(
    name: str, reward: Reward, completion: str, sample: "Sample", tokens: int | None = None
) -> float:
    """What the reward called `name` gives; a reward that asks for `tokens` gets the number sampled.

    Raises:
        UserError: it returned no finite number.
        RuntimeError: it raised; from its own error.
    """
    options = {"tokens": tokens} if "tokens" in inspect.signature(reward).parameters else {}
    try:
        value = reward(completion, sample, **options)
    except Exception as error:
        raise RuntimeError(f"--reward_funcs {name}: failed on row {sample.row}") from error
    if isinstance(value, str) or not hasattr(value, "__float__") or not math.isfinite(value):
        raise UserError(f"--reward_funcs {name}: returned {value!r} and not a finite number")
    return float(value)


def get_reward(name: str) -> Reward:
    """The reward of that name, or `function` of `module` for `module:function`.

    Raises:
        UserError: unknown name (the nearest one is suggested), or a module or function that is not
        there.
    """
    if name in REWARDS:
        return REWARDS[name]
    module, colon, function = name.partition(":")
    if not colon:
        near = difflib.get_close_matches(name, REWARDS, n=1, cutoff=0.0)
        raise UserError(
            f"unknown reward {name!r}: did you mean {near[0]!r}? "
            f"Rewards: {', '.join(REWARDS)}, or module:function"
        )
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # importing runs foreign code: anything may come
        raise UserError(
            f"cannot load the reward {name!r}: {type(error).__name__}: {error}. It is read as "
            "module:function; PYTHONPATH=. lets it find a module in the current folder"
        ) from error
    if not callable(found):
        raise UserError(f"the reward {name!r} is not a function but {type(found).__name__}")
    return found
