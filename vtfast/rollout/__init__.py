"""Sampling from the policy."""

from vtfast.rollout.engine import RolloutEngine
from vtfast.rollout.sampling import Completion, Sampling

__all__ = ["Completion", "RolloutEngine", "Sampling"]
