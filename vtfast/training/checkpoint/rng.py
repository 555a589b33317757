"""The states of a process's random number generators, as tensors: those of PyTorch, Python and NumPy.

vtfast itself does not depend on them, since data order and sampling are functions of the seed and the step; a user's
reward may.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

GAUSS = "random.gauss"


def rng_state() -> dict[str, Tensor]:
    """The states as named tensors."""
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    rest = [numpy_state["state"]["pos"], numpy_state["has_gauss"], numpy_state["gauss"]]
    state = {
        "random.torch": torch.get_rng_state(),
        "random.python": torch.tensor([version, *words]),
        "random.numpy": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
        "random.numpy_rest": torch.tensor(rest, dtype=torch.float64),
    }
    if gauss is not None:
        state[GAUSS] = torch.tensor(gauss, dtype=torch.float64)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["random.cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Tensor]) -> None:
    """Restore the states that `rng_state` returned; raises KeyError, TypeError or ValueError for other tensors."""
    torch.set_rng_state(state["random.torch"])
    version, *words = state["random.python"].tolist()
    random.setstate((version, tuple(words), float(state[GAUSS]) if GAUSS in state else None))
    position, has_gauss, gauss = state["random.numpy_rest"].tolist()
    keys = state["random.numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))
    if "random.cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random.cuda"])
