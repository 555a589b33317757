"""Sampling completions from the policy: a paged key-value cache, batched decode steps, CUDA graphs, and vLLM instead.

Start reading at `engine.py`, then `scheduler.py` (who runs when) and `decode.py` (one token for every row).
"""

from vtfast.rollout.engine import RolloutEngine
from vtfast.rollout.sampling_params import Completion, Sampling

__all__ = ["Completion", "RolloutEngine", "Sampling"]
