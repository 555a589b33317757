"""`--deterministic`: the same settings on the same machine give the same bits.

On the CPU they do so anyway. On CUDA a few libraries add in whatever order their blocks finish; each is told not to:

    PyTorch     `use_deterministic_algorithms`: the ordered way where there are two, an error that names the operation
                where there is none. Its varlen and SDPA flash attention follow it.
    cuBLAS      workspaces of a fixed size, so that streams do not race for them
    cuDNN       no trying out of algorithms, and only those with a fixed order
    flash-attn  its ordered backward, by an argument of each call
    NCCL        one algorithm whose order the topology fixes

The kernels of `vtfast_kernels` and Liger's that are used here sum in a fixed order and are not tuned by the clock.
It is an error in this mode if free memory limits a size (`require_full_size`); the settings refuse vLLM.
"""

from __future__ import annotations

import inspect
import os
import random
from collections.abc import Callable

import numpy as np
import torch

from vtfast.utils.errors import UserError

DETERMINISTIC_ENV = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NCCL_ALGO": ("Ring", "CollnetDirect", "CollnetChain", "^NVLS"),
}
"""Environment variables and the values under which their library is deterministic; the first is set where none is."""


def make_deterministic(cuda: bool) -> None:
    """For the rest of the process; to be called before CUDA is in use.

    Raises UserError for an environment variable with another value than will do, or if CUDA has begun without it."""
    for name, values in DETERMINISTIC_ENV.items() if cuda else ():
        if torch.cuda.is_initialized() and name not in os.environ:
            raise UserError(f"--deterministic true: set {name}={values[0]} before CUDA is used")
        given = os.environ.setdefault(name, values[0])
        if given not in values:
            raise UserError(
                f"--deterministic true: {name}={given} is not deterministic; unset it, or use one of"
                f" {', '.join(values)}"
            )
    torch.use_deterministic_algorithms(True)
    # Nothing here reads what it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def flash_attn_kwargs(function: Callable) -> dict[str, bool]:
    """Arguments for flash-attn's `function` as this process wants it. Raises UserError if it has no ordered way."""
    if not is_deterministic():
        return {}
    if "deterministic" not in inspect.signature(function).parameters:
        raise UserError(
            f"--deterministic true: this version of {function.__module__} has no deterministic backward;"
            " update it, or use --attn_implementation varlen"
        )
    return {"deterministic": True}


def require_full_size(wanted: int, room: int, what: str, flag: str) -> None:
    """Raises UserError if `room` cuts `wanted` short: results would depend on what else is in memory."""
    if is_deterministic() and room < wanted:
        raise UserError(
            f"--deterministic true: memory for {room} {what} of the {wanted} wanted, and what is free is a matter of"
            f" chance; give {flag}"
        )


def is_deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled()


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
