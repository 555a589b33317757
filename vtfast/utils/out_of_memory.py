"""Recognises out-of-memory errors of every library, and frees memory after one."""

from __future__ import annotations

import gc

import torch

MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
)
"""In RuntimeErrors of PyTorch's CPU allocator, of CUDA and its libraries, and of Triton."""


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in MESSAGES)


def free_memory() -> None:
    """Free memory that nothing refers to. Call it outside the `except` block: the traceback of an error refers to all
    that its frames hold."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
