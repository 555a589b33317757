"""`--dry-run`: whether a run fits, before it starts: parameters, memory of a GPU, tokens, epochs."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from vtfast.config import Config, RunConfig, SFTConfig
from vtfast.cost.largest_step import Workload, workload_of
from vtfast.cost.memory import MemoryEstimate, ParameterCount, count_parameters, estimate_memory
from vtfast.data.data_files import find_files
from vtfast.data.splits import SYNTHETIC, SYNTHETIC_TRAIN
from vtfast.model.loading import parse_dtype, read_model_config
from vtfast.model.meta_model import meta_policy_for_run
from vtfast.model.policy import Policy
from vtfast.utils.errors import UserError
from vtfast.utils.files import expand

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


def estimate(config: RunConfig, gpu_memory_gb: str | None = None) -> Iterator[str]:
    """Lines of text. If the model cannot be read, a line says why, and the rest follows."""
    device = find_device(config, gpu_memory_gb)
    ranks = int(os.environ.get("WORLD_SIZE") or config.num_processes or 1)
    try:
        policy = meta_policy_for_run(read_model_config(config.model), config, parse_dtype(config.dtype, device.kind))
    except UserError as error:
        yield f"No estimate of the memory: {error}"
        yield from _batch(config, workload_of(config, has_images=True), ranks)
        return
    load = workload_of(config, policy.vision is not None)
    memory = estimate_memory(policy, config, ranks, device.kind, device.bytes)
    yield f"Estimate for each of {ranks} rank(s) on {device.name}, in {str(policy.head.dtype)[6:]}. 1 GB = 10^9 bytes."
    yield (
        f"Everything at its limit: prompts of {load.prompt:,} tokens"
        + (f", {load.image:,} of them image" if load.image else "")
        + f"; completions of {load.completion:,}."
    )
    yield ""
    yield from _parameters(count_parameters(policy))
    yield ""
    yield from _memory(memory, load, config)
    yield from _verdict(memory, policy, config, device, ranks)
    yield ""
    yield from _batch(config, load, ranks)


def _parameters(parts: list[ParameterCount]) -> Iterator[str]:
    yield f"{'parameters':<34}{'all':>10}{'trained':>10}"
    total = ParameterCount("together", sum(part.parameters for part in parts), sum(part.trained for part in parts))
    for part in [*parts, total]:
        yield f"  {part.name:<32}{_count(part.parameters):>10}{_count(part.trained) if part.trained else 'frozen':>10}"


def _memory(memory: MemoryEstimate, load: Workload, config: RunConfig) -> Iterator[str]:
    recomputed = ", checkpointed" if config.gradient_checkpointing else ""
    per_token = memory.activations / load.tokens / 1e6
    standing = {
        "weights": memory.weights,
        "fp32 copy and Adam, this rank's": memory.optimizer,
        "reference model": memory.reference,
        "CUDA, NCCL and graphs (a guess)": memory.overhead,
    }
    sampling = {"KV cache": memory.cache, "fused weights for decoding": memory.fused_weights, "vLLM": memory.vllm}
    update = {
        "gradients and their buckets": memory.gradients,
        f"activations{recomputed}": memory.activations,
        "vision encoder's activations": memory.vision_activations,
        "loss and the head's gradient": memory.loss,
    }
    rollout = {"prefill": memory.prefill}
    if memory.keeps_cache:
        standing |= sampling
    else:
        rollout = sampling | rollout
    notes = {f"activations{recomputed}": f"{load.tokens:,} tokens x {per_token:.3g} MB"}
    sums = {
        "throughout": (standing, memory.standing),
        "in an update, in addition": (update, memory.update),
        "in a rollout, in addition": (rollout, memory.rollout),
    }
    for title, (rows, total) in sums.items():
        yield f"{title:<44}{_gb(total):>10} GB"
        for name, size in rows.items():
            if size:
                note = f"  {notes[name]}" if name in notes else ""
                yield f"  {name:<32}{_gb(size):>10}{note}"
    yield f"{'peak':<44}{_gb(memory.peak):>10} GB"


def _verdict(memory: MemoryEstimate, policy: Policy, config: RunConfig, device: Device, ranks: int) -> Iterator[str]:
    spare = device.bytes - memory.peak
    if spare < 0:
        yield f"fits: no, {_gb(-spare)} GB above {_gb(device.bytes)}"
        yield f"      {advice(policy, config, device, ranks)}"
    elif spare < TIGHT * device.bytes:
        yield f"fits: tight, {_gb(spare)} GB to spare of {_gb(device.bytes)}"
    else:
        yield f"fits: yes, {_gb(spare)} GB to spare of {_gb(device.bytes)}"


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


def _batch(config: RunConfig, load: Workload, ranks: int) -> Iterator[str]:
    prompts = ranks * config.prompts_per_rank
    tokens = prompts * (load.prompt + load.group * load.completion)
    completions = f" with {load.group} completions each" if not isinstance(config, SFTConfig) else ""
    yield (
        f"{prompts} prompts a step{completions}: up to {tokens:,} tokens, {load.micro_batches} micro-batch(es) a rank"
    )
    rows = count_rows(config)
    if rows is None:
        yield f"rows of {config.data}: unknown until they are read"
        return
    updates = getattr(config, "num_iterations", 1)
    steps = math.ceil(rows / prompts * updates)
    if config.max_steps is None:
        asked = f"--num_train_epochs {config.num_train_epochs:g} is {math.ceil(config.num_train_epochs * steps):,}"
    else:
        asked = f"--max_steps {config.max_steps} is {config.max_steps / steps:.2f} of it"
    yield f"an epoch of at most {rows:,} rows is {steps:,} steps; {asked}"


def count_rows(config: RunConfig) -> int | None:
    """The number of rows that a run reads at most; None if counting them means reading the files, or the hub."""
    if config.data == SYNTHETIC:
        rows = SYNTHETIC_TRAIN
    elif not expand(config.data).exists():
        return None
    else:
        try:
            counts = [_rows_in(file.open()) for file in find_files(config.data, config.split, True)]
        except (UserError, OSError, ValueError):  # the run itself reports the bad file
            return None
        known = [count for count in counts if count is not None]
        if len(known) < len(counts):
            return None
        rows = sum(known)
    return min(rows, config.first_rows or rows, config.first_n or rows)


def _rows_in(path: str | BinaryIO) -> int | None:
    assert isinstance(path, str), "only local files are counted"
    if path.endswith(".parquet"):
        from pyarrow.parquet import read_metadata

        return read_metadata(path).num_rows
    if path.endswith(".jsonl"):
        with open(path, "rb") as file:
            return sum(1 for line in file if line.strip())
    return None


def _gb(size: float) -> str:
    """Three significant digits, tiny sizes too."""
    value = size / GB
    if value < 0.01:
        return f"{value:.2g}"
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def _count(number: int) -> str:
    if number < 1e6:
        return f"{number:,}"
    return f"{number / 1e6:,.1f} M"
