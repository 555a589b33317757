"""Ranks and the ZeRO-2 engine. One process without a launcher, and `deepspeed train.py`, are the same code.

DeepSpeed is imported here alone, and only once the device is known.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from vtfast.config import RunConfig
from vtfast.distributed import watchdog
from vtfast.distributed.determinism import make_deterministic
from vtfast.distributed.ranks import Ranks, prompts_per_rank
from vtfast.distributed.zero2 import import_deepspeed
from vtfast.utils.errors import UserError

if TYPE_CHECKING:
    pass

log = logging.getLogger("vtfast")


def init_distributed(config: RunConfig) -> Ranks:
    """Join the process group of the launcher, or start a group of one."""
    cuda = torch.cuda.is_available() if config.device == "auto" else config.device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device; use --device cpu or auto")
    if config.deterministic:
        make_deterministic(cuda)
    if not cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
    local = int(os.environ.get("LOCAL_RANK", 0))
    if cuda:
        torch.cuda.set_device(local)

    deepspeed = import_deepspeed()
    if not dist.is_initialized():
        backend = "nccl" if cuda else "gloo"
        if "RANK" not in os.environ:  # no launcher: a group of one needs no port and no environment
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
        limit = timedelta(seconds=config.ddp_timeout)
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            _start_again(backend, limit, torch.device("cuda", local) if cuda else None)
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=limit)
        atexit.register(dist.destroy_process_group)  # not earlier: DeepSpeed keeps hold of it
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cuda", local) if cuda else torch.device("cpu"))
    if not cuda:
        # Written down with the settings: sums are cut by threads, so another number gives other bits.
        config.cpu_threads = config.cpu_threads or max(1, (os.cpu_count() or 1) // ranks.size)
        _tune_cpu(config.cpu_threads)
    if ranks.size > 1 and config.rank_timeout:
        _start_watchdog(ranks, config.rank_timeout)
    if config.num_processes not in (None, ranks.size) and ranks.is_main:
        log.warning(
            "recipe %s was written for %d ranks and runs on %d: %d prompts a step instead of %d"
            " (--gradient_accumulation_steps changes that)",
            config.recipe,
            config.num_processes,
            ranks.size,
            prompts_per_rank(config) * ranks.size,
            prompts_per_rank(config) * config.num_processes,
        )
    return ranks


def _start_again(backend: str, limit: timedelta, device: torch.device | None) -> None:
    """The process group of ranks that torchrun has restarted. Its store may still hold the addresses of the ranks
    before them, to which the new ones would try to connect; so every attempt has keys of its own."""
    size, attempt = int(os.environ["WORLD_SIZE"]), os.environ["TORCHELASTIC_RESTART_COUNT"]
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosted_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    rank = int(os.environ["RANK"])
    store = dist.TCPStore(*address, size, rank == 0 and not hosted_by_agent, timeout=limit)
    store = dist.PrefixStore(f"attempt-{attempt}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit, device_id=device)


def _start_watchdog(ranks: Ranks, limit: float) -> None:
    """Collective. The client is the watchdog's own: one that waits in a collective does not answer."""
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*address, is_master=False, wait_for_workers=False)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives the ranks
    watchdog.start_watchdog(dist.PrefixStore(f"watchdog-{attempt}", store), ranks.rank, ranks.size, limit)


def _tune_cpu(threads: int) -> None:
    torch.set_num_threads(threads)
    # glibc hands every large freed block back to the kernel, and faulting its pages in again took a fifth of a step.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mmap_threshold, trim_threshold = -3, -1
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, 1 << 30)
