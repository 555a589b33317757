"""Whole runs in this process, finished or killed, and their comparison to the bit."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vtfast.config import Config, SFTConfig, load_config
from vtfast.report.tracking import MEASURED
from vtfast.trainer import Trainer
from vtfast.training.sft import SFTTrainer

SHORT = {
    "max_steps": 4,
    "eval_samples": 4,
    "num_generations": 4,
    "max_completion_length": 12,
    "report_to": "none",
    "per_device_train_batch_size": 3,
    "save_steps": 1,
    "warmup_steps": 2,
}
SHORT_SFT = {name: value for name, value in SHORT.items() if name not in ("num_generations",)} | {
    "recipe": "tiny-spatial-sft"
}


def noisy_reward(completion: str, sample) -> float:
    """A custom reward that uses random numbers."""
    return random.random() + np.random.random() + torch.rand(()).item()


def build(**settings):
    if settings.get("recipe", "").endswith("-sft"):
        settings = SHORT_SFT | settings
        recipe = settings.pop("recipe")
        return SFTTrainer(load_config(recipe, overrides=settings, kind=SFTConfig))
    return Trainer(load_config(overrides=SHORT | settings, kind=Config))


class Killed(Exception):
    pass


def run(folder: Path, kill_at: int | None = None, **settings) -> Path:
    """A run in this process. `kill_at`: it ends in that step, after the weights have changed."""
    trainer = build(output_dir=str(folder), **settings)
    if kill_at is not None:
        whole_step = trainer.step

        def step(number, questions):
            result = whole_step(number, questions)
            if number == kill_at:
                raise Killed
            return result

        trainer.step = step
        with pytest.raises(Killed):
            trainer.run()
    else:
        trainer.run()
    return folder


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(MEASURED)} for line in lines]


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    (path,) = (folder / "checkpoints" / f"step-{step}").glob("*model.safetensors")
    return load_file(path)


def assert_same_run(one: Path, other: Path, step: int = 4) -> None:
    assert rows(one) == rows(other)
    assert rows(one, "completions.jsonl") == rows(other, "completions.jsonl")
    assert unequal(weights(one, step), weights(other, step)) == []
    resume = Path("checkpoints") / f"step-{step}" / "resume" / "rank-0.safetensors"
    assert unequal(load_file(one / resume), load_file(other / resume)) == []


def unequal(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> list[str]:
    assert expected.keys() == found.keys()
    return [name for name, value in expected.items() if not value.equal(found[name])]


def step(folder: Path, number: int) -> Path:
    return folder / "checkpoints" / f"step-{number}"


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """One bit, in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
