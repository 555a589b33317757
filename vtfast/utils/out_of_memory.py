"""What running out of memory looks like, and how to get some back."""

from __future__ import annotations

import gc

import torch

IN_WORDS = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
)
"""How RuntimeErrors of PyTorch's CPU allocator, of CUDA and its libraries, and of Triton say it."""


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in IN_WORDS)


def free_memory() -> None:
    """Give back what nothing refers to any more. To be called outside the `except` block: the traceback of an error
    refers to everything that its frames held."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
