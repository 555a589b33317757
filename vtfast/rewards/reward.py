"""The interface of a reward, and `call_reward`, which turns any error in it into a score of 0 with a reason."""

import functools
import inspect
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vtfast.data import Sample
from vtfast.utils.text import shorten

Reward = Callable[..., float]
"""`(completion, sample)`, and by name `tokens` and `prefix` where it has such a parameter."""
LONGEST_REASON = 200


@dataclass(frozen=True)
class RewardInput:
    """The input of a reward."""

    completion: str
    """The whole response; where the prompt ended with `<think>`, it starts with that tag."""
    sample: Sample
    """Without its images for a built-in reward in a worker process."""
    tokens: int
    """Number of tokens that were sampled."""
    prefix: str = ""
    """The start of `completion` that the prompt had already written."""


@dataclass(frozen=True)
class RewardResult:
    value: float
    failure: str | None = None
    """Why the value is missing (then it is 0): one line."""


def failed_result(reason: str | BaseException) -> RewardResult:
    """A score of 0; of an exception, the reason is its type and first line."""
    if isinstance(reason, BaseException):
        lines = str(reason).strip().splitlines()
        reason = type(reason).__name__ + (f": {lines[0]}" if lines else "")
    return RewardResult(0.0, reason[:LONGEST_REASON])


def call_reward(reward: Reward, response: RewardInput) -> RewardResult:
    """The score of `response`; 0 and a reason if the reward raises or does not return a finite number."""
    given = {"tokens": response.tokens, "prefix": response.prefix}
    try:
        wanted = _options(reward)
        options = {name: value for name, value in given.items() if name in wanted}
        value: Any = reward(response.completion, response.sample, **options)
        if isinstance(value, str) or not hasattr(value, "__float__") or not math.isfinite(value):
            return failed_result(f"returned {shorten(repr(value), 60)} and not a finite number")
        return RewardResult(float(value))
    except BaseException as error:  # also sys.exit and math-verify's time limit, which are no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return failed_result(error)


def zero_on_error(reward: Reward) -> Reward:
    """Decorates a reward that is also called directly: it returns 0 instead of raising."""

    @functools.wraps(reward)
    def guarded(completion: str, sample: Sample, **options: Any) -> float:
        try:
            return reward(completion, sample, **options)
        except Exception:
            logging.getLogger("vtfast").debug("%s failed", reward.__name__, exc_info=True)
            return 0.0

    return guarded


def _options(reward: Reward) -> set[str]:
    """Names of the reward's parameters after completion and sample."""
    try:
        parameters = inspect.signature(reward).parameters.values()
    except ValueError:  # some callables written in C have none
        return set()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return {"tokens", "prefix"}
    return {parameter.name for parameter in parameters}
