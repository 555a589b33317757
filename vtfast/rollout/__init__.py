"""Sampling completions from the policy that is being trained."""

from vtfast.rollout.engine import Completion, RolloutEngine, Sampling

__all__ = ["Completion", "RolloutEngine", "Sampling"]
