"""Whether a run fits into the memory of its device, and which settings would make it fit."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from vtfast.config import Config, RunConfig
from vtfast.cost.memory import MemoryEstimate, estimate_memory
from vtfast.model.policy import Policy
from vtfast.utils.errors import UserError

GB = 1e9
TIGHT = 0.1
"""A run that leaves less than this share of the device free is reported as tight."""
GPU_MEMORY_GB = {
    "L4": 24,
    "RTX4090": 24,
    "RTX5090": 32,
    "A100-40": 40,
    "L40S": 48,
    "A100": 80,
    "H100": 80,
    "H200": 141,
    "B200": 180,
}
"""As the vendor states it."""
MAX_RANKS = 64


@dataclass(frozen=True)
class Device:
    """The memory that one rank can use."""

    kind: str
    """cpu or cuda."""
    bytes: int
    name: str


def find_device(config: RunConfig, gpu_memory_gb: str | None = None) -> Device:
    """The device of a rank, or a GPU that this machine need not have: `gpu_memory_gb`, a number or a name of
    GPU_MEMORY_GB. Raises UserError for any other value."""
    if gpu_memory_gb is not None:
        name = gpu_memory_gb.upper()
        is_number = re.fullmatch(r"\d+(\.\d*)?", name, re.ASCII)
        gigabytes = float(name) if is_number else GPU_MEMORY_GB.get(name, 0)
        if not 0 < gigabytes < math.inf:
            names = ", ".join(GPU_MEMORY_GB)
            raise UserError(f"--gpu_memory_gb {gpu_memory_gb}: must be a number or one of {names}")
        return Device("cuda", int(gigabytes * GB), f"{'a GPU' if is_number else name} of {gigabytes:g} GB")
    if config.device != "cpu" and torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return Device("cuda", free, f"{torch.cuda.get_device_name()}, {free / total:.0%} of it free")
    import psutil

    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    shared = f", shared by {local_ranks} ranks" if local_ranks > 1 else ""
    return Device("cpu", psutil.virtual_memory().available // local_ranks, f"the CPU's memory{shared}")


def verdict(memory: MemoryEstimate, policy: Policy, config: RunConfig, device: Device, ranks: int) -> Iterator[str]:
    spare = device.bytes - memory.peak
    if spare < 0:
        yield f"fits: no, {gigabytes(-spare)} GB above {gigabytes(device.bytes)}"
        yield f"      {advice(policy, config, device, ranks)}"
    elif spare < TIGHT * device.bytes:
        yield f"fits: tight, {gigabytes(spare)} GB to spare of {gigabytes(device.bytes)}"
    else:
        yield f"fits: yes, {gigabytes(spare)} GB to spare of {gigabytes(device.bytes)}"


def advice(policy: Policy, config: RunConfig, device: Device, ranks: int) -> str:
    """What to change so that it fits: one setting if that is enough, else several, else more ranks."""

    def fits(changed: RunConfig, count: int = ranks) -> bool:
        return estimate_memory(policy, changed, count, device.kind, device.bytes).peak <= device.bytes

    together: dict[str, Any] = {}
    for name, value in _remedies(config):
        alone = config.model_copy(update={name: value})
        if fits(alone):
            return f"try {_flag(name, _largest(config, name, value, fits))}"
        together[name] = value
    everything = config.model_copy(update=together)
    text = " ".join(_flag(name, value) for name, value in together.items())
    if together and fits(everything):
        return f"try {text}"
    for count in range(ranks + 1, MAX_RANKS + 1):
        if fits(everything, count):
            return f"try {count} ranks" + (f" with {text}" if text else "")
    return "no number of ranks is enough: use a smaller model, --use_peft true, or a larger GPU"


def _flag(name: str, value: object) -> str:
    return f"--{name} {str(value).lower()}"


def _remedies(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """Settings that lower memory without changing the result, those that cost least time first."""
    shortest = config.max_prompt_length + config.max_completion_length
    if config.tokens_per_micro_batch > shortest:
        yield "token_budget", shortest
    if not config.gradient_checkpointing:
        yield "gradient_checkpointing", True
    if isinstance(config, Config) and config.beta > 0 and not (config.use_peft or config.offload_reference):
        yield "offload_reference", True
    if config.rollout_keep_cache and not config.use_vllm:
        yield "rollout_keep_cache", False
    if config.use_vllm and not config.vllm_enable_sleep_mode:
        yield "vllm_enable_sleep_mode", True


def _largest(config: RunConfig, name: str, least: Any, fits: Callable[[RunConfig], bool]) -> Any:
    """The largest token budget that fits, in two digits; other remedies have one value."""
    if name != "token_budget":
        return least
    low, high = least, config.tokens_per_micro_batch
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        if fits(config.model_copy(update={"token_budget": middle})):
            low = middle
        else:
            high = middle
    step = 10 ** max(0, len(str(low)) - 2)
    return max(least, low // step * step)


def gigabytes(size: float) -> str:
    """Of a size in bytes: three significant digits, tiny sizes too."""
    value = size / GB
    if value < 0.01:
        return f"{value:.2g}"
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"
