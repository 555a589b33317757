"""The start of a rank: device, process group, threads, watchdog. The same code with and without a launcher."""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from vtfast.config import RunConfig
from vtfast.distributed import watchdog
from vtfast.distributed.determinism import make_deterministic
from vtfast.distributed.interface import set_gloo_interface
from vtfast.distributed.ranks import Ranks
from vtfast.distributed.zero2 import import_deepspeed

log = logging.getLogger("vtfast")


def init_distributed(config: RunConfig) -> Ranks:
    """Join the launcher's process group, or start a group of one. Sets `config.cpu_threads` on the CPU."""
    device = _choose_device(config.device)
    if config.deterministic:
        make_deterministic(cuda=device.type == "cuda")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # not before make_deterministic: this initialises CUDA
    if not dist.is_initialized():
        _init_process_group(device, timedelta(seconds=config.ddp_timeout))
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), device)
    if device.type == "cpu":
        # Saved with the settings: the number of threads decides the order of sums, so another number gives other bits.
        config.cpu_threads = config.cpu_threads or max(1, (os.cpu_count() or 1) // ranks.size)
        _tune_cpu(config.cpu_threads)
    if ranks.size > 1 and config.rank_timeout:
        _start_watchdog(ranks, config.rank_timeout)
    if ranks.is_main:
        _warn_of_other_batch_size(config, ranks.size)
    return ranks


def _choose_device(name: str) -> torch.device:
    """This rank's device. `name`: auto, cpu or cuda. Tells DeepSpeed, which chooses its accelerator when imported."""
    if name == "cpu" or not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def _init_process_group(device: torch.device, timeout: timedelta) -> None:
    deepspeed = import_deepspeed()
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" not in os.environ:  # no launcher: a group of one needs no port and no environment
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed requires it
    set_gloo_interface()  # on CUDA, too: the hosts agree over gloo
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        _init_restarted_ranks(backend, timeout, device)
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
    atexit.register(_leave_process_group)  # not earlier: DeepSpeed keeps references to it


def _leave_process_group() -> None:
    """Not after a failure: NCCL would wait for collectives that the other ranks have left for good."""
    if not watchdog.has_failed():
        dist.destroy_process_group()


def _init_restarted_ranks(backend: str, timeout: timedelta, device: torch.device) -> None:
    """The process group of ranks that torchrun has restarted.

    The store may still hold the addresses of the former ranks, so each attempt has keys of its own."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    hosted_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(*_store_address(), size, rank == 0 and not hosted_by_agent, timeout=timeout)
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"attempt-{attempt}", store),
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )


def _start_watchdog(ranks: Ranks, limit: float) -> None:
    """Collective. The watchdog has its own client of the store: one that waits for a collective does not answer."""
    store = dist.TCPStore(*_store_address(), is_master=False, wait_for_workers=False)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives the ranks
    watchdog.start_watchdog(dist.PrefixStore(f"watchdog-{attempt}", store), ranks.rank, ranks.size, limit)


def _store_address() -> tuple[str, int]:
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def _warn_of_other_batch_size(config: RunConfig, num_ranks: int) -> None:
    if config.num_processes not in (None, num_ranks):
        log.warning(
            "recipe %s was written for %d ranks and runs on %d: %d prompts a step instead of %d"
            " (--gradient_accumulation_steps changes that)",
            config.recipe,
            config.num_processes,
            num_ranks,
            config.prompts_per_rank * num_ranks,
            config.prompts_per_rank * config.num_processes,
        )


def _tune_cpu(threads: int) -> None:
    torch.set_num_threads(threads)
    # glibc returns every large freed block to the kernel; the page faults of the next ones took a fifth of a step.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mmap_threshold, trim_threshold = -3, -1
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, 1 << 30)
