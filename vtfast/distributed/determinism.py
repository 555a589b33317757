"""`--deterministic`: the same settings on the same machine give the same bits.

On the CPU they always do. On CUDA some libraries add in the order in which blocks finish, unless that is switched off:

    PyTorch     `use_deterministic_algorithms`: the deterministic algorithm of two, or an error that names the operation
                that has none. Its varlen and SDPA flash attention follow it.
    cuBLAS      workspaces of a fixed size, so that streams do not race for them
    cuDNN       no benchmark of algorithms, and only those with a fixed order
    flash-attn  its deterministic backward, by an argument of each call
    NCCL        an algorithm whose order the topology fixes

The kernels of `vtfast_kernels`, and those of Liger that are used here, sum in a fixed order and are not autotuned.
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
"""Environment variable -> the values under which its library is deterministic; an unset one is set to the first."""


def make_deterministic(cuda: bool) -> None:
    """Make the rest of the process deterministic; to be called before CUDA is used.

    Raises UserError if an environment variable has a value that is not deterministic."""
    for name, values in DETERMINISTIC_ENV.items() if cuda else ():
        given = os.environ.setdefault(name, values[0])
        if given not in values:
            raise UserError(
                f"--deterministic true: {name}={given} is not deterministic; unset it, or use one of"
                f" {', '.join(values)}"
            )
    torch.use_deterministic_algorithms(True)
    # Filling costs time, and no code here reads memory that it has not written. torch's stubs lack the setting.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def flash_attn_kwargs(function: Callable) -> dict[str, bool]:
    """Keyword arguments that make flash-attn's `function` deterministic if this process is.

    Raises UserError if it has no deterministic backward."""
    if not is_deterministic():
        return {}
    if "deterministic" not in inspect.signature(function).parameters:
        raise UserError(
            f"--deterministic true: this version of {function.__module__} has no deterministic backward;"
            " update it, or use --attn_implementation varlen"
        )
    return {"deterministic": True}


def require_full_size(size: int, available: int, what: str, flag: str) -> None:
    """In deterministic mode, raises UserError if free memory cuts `size` to `available`: results would depend on it."""
    if is_deterministic() and available < size:
        raise UserError(
            f"--deterministic true: memory for {available} of {size} {what}, and free memory differs from run to run;"
            f" set {flag}"
        )


def is_deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled()


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
