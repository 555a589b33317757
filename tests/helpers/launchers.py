"""Runs in processes of their own, under DeepSpeed's launcher on a port that is free: tests run beside each other."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SHORT = ["--max_steps", "3", "--eval_samples", "16", "--num_generations", "4", "--max_completion_length", "16"]
"""Flags of a run that takes seconds."""
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def deepspeed_launcher(ranks: int = 2) -> tuple[str, ...]:
    return ("deepspeed", "--num_accelerators", str(ranks), "--master_port", str(free_port()))


def outside_ranks() -> dict[str, str]:
    """The environment without what a trainer in this process, or somebody's library, says of ranks."""
    return {name: value for name, value in os.environ.items() if name not in OF_A_RANK}


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return outside_ranks() | {"DS_ACCELERATOR": "cpu", "PATH": path}


def run(folder: Path, *flags: str, launcher: tuple[str, ...] = (sys.executable,)) -> list[dict]:
    """A run in a process of its own; returns its metrics."""
    command = [*launcher, str(ROOT / "train.py"), *SHORT, "--output_dir", str(folder), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=folder.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder.parent / f"{folder.name}.out").write_text(done.stdout)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_close_runs(one: Path, other: Path) -> None:
    """Equal but for the order in which numbers were added up."""
    a, b = ([json.loads(x) for x in (f / "metrics.jsonl").read_text().splitlines()] for f in (one, other))
    for left, right in zip(a, b, strict=True):
        for name in ("loss", "reward", "kl", "grad_norm", "entropy", "completions/mean_length"):
            if left[name] is None:
                assert right[name] is None
                continue
            assert left[name] == pytest.approx(right[name], rel=1e-5, abs=1e-5), (left["step"], name)
    weights, others = (load_file(f / "checkpoints" / "step-3" / "model.safetensors") for f in (one, other))
    for name, value in weights.items():
        torch.testing.assert_close(value, others[name], rtol=1e-5, atol=2e-6, msg=name)
