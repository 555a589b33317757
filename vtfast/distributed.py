"""Ranks and the ZeRO-2 engine. One process without a launcher, and `deepspeed train.py`, are the same code.

DeepSpeed is imported here alone, and only once the device is known.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from vtfast import heartbeat
from vtfast.config import RunConfig
from vtfast.determinism import make_deterministic
from vtfast.errors import UserError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

log = logging.getLogger("vtfast")
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among all of them."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """`value` of every rank, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with heartbeat.waiting():
            dist.all_gather_object(values, value)
        return values

    def from_main(self, value: T) -> T:
        """The value that rank 0 passed."""
        if self.size == 1:
            return value
        box = [value]
        with heartbeat.waiting():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        if self.size > 1:
            with heartbeat.waiting():
                dist.barrier()


def start(config: RunConfig) -> Ranks:
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

    deepspeed = _import_deepspeed()
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
    ranks = Ranks(
        dist.get_rank(),
        dist.get_world_size(),
        torch.device("cuda", local) if cuda else torch.device("cpu"),
    )
    if not cuda:
        # Written down with the settings: sums are cut by threads, so another number gives other bits.
        config.cpu_threads = config.cpu_threads or max(1, (os.cpu_count() or 1) // ranks.size)
        _tune_cpu(config.cpu_threads)
    if ranks.size > 1 and config.rank_timeout:
        _watch(ranks, config.rank_timeout)
    if config.num_processes not in (None, ranks.size) and ranks.is_main:
        log.warning(
            "recipe %s was written for %d ranks and runs on %d: %d prompts a step instead of %d"
            " (--gradient_accumulation_steps changes that)",
            config.recipe, config.num_processes, ranks.size,
            prompts_per_rank(config) * ranks.size, prompts_per_rank(config) * config.num_processes,
        )  # fmt: skip
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
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=limit, device_id=device
    )


def _watch(ranks: Ranks, limit: float) -> None:
    """The heartbeat of all ranks. Collective."""
    on_this_machine = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    door = None
    if ranks.is_main:
        local = on_this_machine == str(ranks.size)
        door = heartbeat.Door(os.environ["MASTER_ADDR"], local=local)
    address = ranks.from_main(door and door.address)
    members = ranks.gather(heartbeat.Member(ranks.rank, socket.gethostname(), os.getpid()))
    heartbeat.start(members, ranks.rank, limit, door, address)


def _tune_cpu(threads: int) -> None:
    torch.set_num_threads(threads)
    # glibc hands every large freed block back to the kernel, and faulting its pages in again took a fifth of a step.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mmap_threshold, trim_threshold = -3, -1
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, 1 << 30)


def prompts_per_rank(config: RunConfig) -> int:
    return config.per_device_train_batch_size * config.gradient_accumulation_steps


def zero2_engine(config: RunConfig, objective: nn.Module) -> DeepSpeedEngine:
    """ZeRO-2 around `objective`: AdamW, the schedule and gradient clipping of `config`.

    bf16 weights get fp32 masters; fp32 weights are trained as they are.
    """
    from transformers import get_scheduler

    deepspeed = _import_deepspeed()
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    if not trained:
        raise UserError(f"--freeze {','.join(config.freeze)}: nothing is left to train")
    cuda = trained[0].is_cuda
    optimizer = torch.optim.AdamW(
        trained,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )
    scheduler = get_scheduler(
        config.lr_scheduler_type, optimizer, config.warmup_steps, config.max_steps
    )
    settings = {
        "train_micro_batch_size_per_gpu": config.per_device_train_batch_size,
        "gradient_accumulation_steps": 1,  # the trainer says itself which pass is a step's last
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": trained[0].dtype == torch.bfloat16},
        "data_types": {
            "grad_accum_dtype": "fp32"
        },  # bf16 sums over passes would lose small gradients
        "zero_optimization": {"stage": 2, "overlap_comm": cuda, "contiguous_gradients": True},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(
        model=objective, model_parameters=trained, optimizer=optimizer, lr_scheduler=scheduler, config=settings
    )  # fmt: skip
    return engine


def _import_deepspeed():
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # DeepSpeed's shared-memory collectives for CPU ranks are C++ compiled at the first start. gloo does the same
    # without a compiler and without half a minute of waiting.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
