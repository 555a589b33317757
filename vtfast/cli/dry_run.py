"""`--dry-run`: whether a run fits, before it starts: parameters, memory of a GPU, tokens, epochs."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from typing import BinaryIO

from vtfast.config import RunConfig, SFTConfig
from vtfast.cost.largest_step import Workload, workload_of
from vtfast.cost.memory import MemoryEstimate, ParameterCount, checkpoint_bytes, count_parameters, estimate_memory
from vtfast.cost.verdict import find_device, gigabytes, verdict
from vtfast.data.data_files import find_files
from vtfast.data.splits import SYNTHETIC, SYNTHETIC_TRAIN
from vtfast.model.loading import parse_dtype, read_model_config
from vtfast.model.meta_model import meta_policy_for_run
from vtfast.utils.errors import UserError
from vtfast.utils.files import expand


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
    parts = count_parameters(policy)
    yield from _parameters(parts)
    yield ""
    yield from _memory(memory, load, config)
    yield from verdict(memory, policy, config, device, ranks)
    yield _disk(config, checkpoint_bytes(parts, config))
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
    if memory.cache < memory.full_cache:
        notes["KV cache"] = f"what is left; {gigabytes(memory.full_cache)} would hold all rows, so some prompts wait"
    sums = {
        "throughout": (standing, memory.standing),
        "in an update, in addition": (update, memory.update),
        "in a rollout, in addition": (rollout, memory.rollout),
    }
    for title, (rows, total) in sums.items():
        yield f"{title:<44}{gigabytes(total):>10} GB"
        for name, size in rows.items():
            if size:
                note = f"  {notes[name]}" if name in notes else ""
                yield f"  {name:<32}{gigabytes(size):>10}{note}"
    yield f"{'peak':<44}{gigabytes(memory.peak):>10} GB"


def _disk(config: RunConfig, size: int) -> str:
    """What the checkpoints of the run take, beside what is free where they go. `size`: of one."""
    folder = expand(config.output_dir or "runs").absolute()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    count: int | None = 1
    if config.save_steps:
        count = config.max_steps and max(1, -(-config.max_steps // config.save_steps))
    if config.save_total_limit:
        most = config.save_total_limit + 1  # the oldest is deleted after the newest is written
        count = min(count, most) if count else most
    known = f"{count} of them {gigabytes(count * size)} GB" if count else "their number depends on the data"
    short = "" if (count or 1) * size < free else ": not enough; --save_total_limit keeps fewer"
    return f"disk: a checkpoint takes {gigabytes(size)} GB, {known}; {gigabytes(free)} GB are free{short}"


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


def _count(number: int) -> str:
    if number < 1e6:
        return f"{number:,}"
    return f"{number / 1e6:,.1f} M"
