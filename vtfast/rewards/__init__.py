"""Rewards: `(completion, sample) -> float`, one number per completion. Start reading in strict.py, the default rewards.

    strict.py   rewards for right answers only (the default)
    visualthinker.py  the same decisions as VisualThinker's code (`--reward_mode recipe`)
    reward.py   the interface of a reward, and a call that turns errors into a score of 0
    worker_pool.py  processes that can be killed
    manager.py  all rewards of a step

A reward is named by its name here, or as `module:function` for the user's own; the trainer adds up their values. A
user's reward may have a parameter `tokens`, the number of sampled tokens, and a parameter `prefix`, the start of the
completion that the prompt had already written (`<think>`, or nothing).
"""

import difflib
import importlib
import os
import sys

from vtfast.rewards import strict, visualthinker
from vtfast.rewards.reward import Reward, RewardInput, RewardResult, call_reward
from vtfast.rewards.strict import accuracy_reward, format_reward, length_reward
from vtfast.utils.errors import UserError

__all__ = [
    "MODES",
    "REWARDS",
    "Reward",
    "RewardInput",
    "RewardResult",
    "accuracy_reward",
    "call_reward",
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
    "recipe": REWARDS | {"accuracy": visualthinker.accuracy_reward, "format": visualthinker.format_reward},
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
        if callable(found):
            return found
        problem = f"not a function but {type(found).__name__}"
    except Exception as error:  # importing runs foreign code: anything may come
        problem = f"{type(error).__name__}: {error}"
    raise UserError(
        f"cannot load the reward {name!r}: {problem}. It is read as "
        "module:function, of what is installed, on PYTHONPATH or in the current folder"
    )
