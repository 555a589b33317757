"""Rewards: `(completion, sample) -> float`, one number per sampled response.

    strict.py   what is right, and nothing that only looks right (the default)
    recipe.py   the decisions of VisualThinker's code, its accidents included
    calling.py  one call, with a score of 0 and a reason for whatever goes wrong in it
    pool.py     processes that can be killed
    scorer.py   all rewards of a step

A reward is chosen by name, or as `module:function` for one's own; the trainer adds up what they return. One's own may
also ask for `tokens`, the number of sampled tokens, and for `prefix`, the start of the completion that the prompt had
already written (`<think>`, or nothing), by having a parameter of that name.
"""

import difflib
import importlib
import os
import sys

from vtfast.rewards import recipe, strict
from vtfast.rewards.reward import Reward, RewardInput, Score, call
from vtfast.rewards.strict import accuracy_reward, format_reward, length_reward
from vtfast.utils.errors import UserError

__all__ = [
    "MODES",
    "REWARDS",
    "Reward",
    "RewardInput",
    "Score",
    "accuracy_reward",
    "call",
    "format_reward",
    "get_reward",
    "length_reward",
]

REWARDS: dict[str, Reward] = {
    "accuracy": strict.accuracy_reward,
    "format": strict.format_reward,
    "length": strict.length_reward,
}
"""Rewards by name."""
MODES: dict[str, dict[str, Reward]] = {
    "strict": REWARDS,
    "recipe": REWARDS | {"accuracy": recipe.accuracy_reward, "format": recipe.format_reward},
}
"""The same by `--reward_mode`."""


def get_reward(name: str, mode: str = "strict") -> Reward:
    """The reward of that name, or `function` of `module` for `module:function`, which no mode changes.

    Raises:
        UserError: unknown name (the nearest one is suggested), or a module or function that is not
        there.
    """
    if name in MODES[mode]:
        return MODES[mode][name]
    module, colon, function = name.partition(":")
    if not colon:
        near = difflib.get_close_matches(name, MODES[mode], n=1, cutoff=0.0)
        raise UserError(
            f"unknown reward {name!r}: did you mean {near[0]!r}? Rewards: {', '.join(MODES[mode])}, or module:function"
        )
    if os.getcwd() not in sys.path:  # last, so that nothing installed is hidden by a file there
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # importing runs foreign code: anything may come
        raise UserError(
            f"cannot load the reward {name!r}: {type(error).__name__}: {error}. It is read as "
            "module:function, of what is installed, on PYTHONPATH or in the current folder"
        ) from error
    if not callable(found):
        raise UserError(f"the reward {name!r} is not a function but {type(found).__name__}")
    return found
