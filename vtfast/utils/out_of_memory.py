"""Recognises out-of-memory errors of every library, and frees memory after one."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from vtfast.utils.text import first_line

MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
)
"""In RuntimeErrors of PyTorch's CPU allocator, of CUDA and its libraries, and of Triton."""

WHAT_TO_LOWER = (
    "lower --max_completion_length, --max_prompt_length or --max_pixels, free the rollout's cache with"
    " --rollout_keep_cache false, or trade time for memory with --gradient_checkpointing true"
)
"""What a user changes when a step does not fit."""


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in MESSAGES)


@dataclass
class Caught:
    """What `catch_out_of_memory` has caught."""

    reason: str | None = None
    """First line of the error; None if there was none."""


@contextlib.contextmanager
def catch_out_of_memory() -> Iterator[Caught]:
    """Leave the block if it runs out of memory. Other errors propagate."""
    caught = Caught()
    try:
        yield caught
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        caught.reason = first_line(error)


def free_memory() -> None:
    """Free memory that nothing refers to. Call it outside an `except` block: the traceback of an error refers to all
    that its frames hold."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
