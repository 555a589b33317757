"""The task of every contestant of `bench step`: a checkpoint, questions with images, a reward and an optimizer."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from transformers import AutoTokenizer, GenerationConfig, Qwen2VLForConditionalGeneration

from bench._workload import Shape, model_config
from vtfast.data.prompt_templates import IMAGE
from vtfast.model.tiny_model import SPECIAL_IDS, build_tiny_model

PATCH = 14
BETA = 0.04
"""Weight of the KL divergence, as in the study."""
MAX_PIXELS = 16384 * 28 * 28
"""More than every image has: none is resized."""


@dataclass(frozen=True)
class Optimizer:
    learning_rate: float = 1e-6
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class Task:
    """Files of a checkpoint and of questions, and the settings of training; the same for all contestants."""

    shape: Shape
    folder: Path
    device: str
    dtype: torch.dtype
    questions: tuple[str, ...]
    threads: int
    optimizer: Optimizer = Optimizer()
    completions: tuple[tuple[tuple[int, ...], ...], ...] | None = None
    """Token ids [prompt][G] that every contestant uses instead of sampling; None: it samples."""

    @property
    def checkpoint(self) -> Path:
        return self.folder / "model"

    def image(self, prompt: int) -> Path:
        return self.folder / f"{prompt}.png"

    def text(self, prompt: int) -> str:
        return IMAGE + self.questions[prompt]


@contextmanager
def make_task(shape: Shape, device: str, threads: int, dtype: torch.dtype) -> Iterator[Task]:
    """Random weights with the sizes of `shape`, one question and one noise image per prompt, in a temporary folder."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        build_tiny_model(folder / "model")  # tokenizer and image processor
        config = model_config(shape.model)
        for name in ("image", "video"):
            setattr(config, f"{name}_token_id", SPECIAL_IDS[f"<|{name}_pad|>"])
        for name in ("start", "end"):
            setattr(config, f"vision_{name}_token_id", SPECIAL_IDS[f"<|vision_{name}|>"])
        torch.manual_seed(0)
        with torch.device(device):
            module = Qwen2VLForConditionalGeneration(config).to(dtype)
        module.generation_config = GenerationConfig()  # no end token: every completion has full length
        module.save_pretrained(folder / "model")
        del module  # leaves the device's memory to the contestants
        tokenizer = AutoTokenizer.from_pretrained(folder / "model", trust_remote_code=False)
        rng = random.Random(0)
        questions = tuple(_question(tokenizer, tokens - 2, rng) for tokens in shape.text)
        task = Task(shape, folder, device, dtype, questions, threads)
        rows = []
        for prompt, (question, grid) in enumerate(zip(questions, shape.grids, strict=True)):
            height, width = (side * PATCH for side in grid)
            noise = Image.frombytes("RGB", (width, height), rng.randbytes(3 * width * height))
            noise.save(task.image(prompt))
            rows.append({"question": question, "answer": "1", "image": task.image(prompt).name})
        (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "template.txt").write_text("{images}{question}\n")
        yield task


def given_completions(shape: Shape) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Random ordinary tokens for `Task.completions`, so that all contestants train on the same completions."""
    rng, words = random.Random(1), min(SPECIAL_IDS.values())
    return tuple(
        tuple(tuple(rng.randrange(words) for _ in range(shape.completion)) for _ in range(shape.G)) for _ in shape.text
    )


def variety(completion: str, sample: object = None) -> float:
    """The reward: the number of different characters of a completion. It depends on the text alone and is hardly ever
    equal within a group, so that random weights have something to learn."""
    return len(set(completion)) / 10


def _question(tokenizer, tokens: int, rng: random.Random) -> str:
    """A question of words that are one token each."""
    vocabulary = sorted(tokenizer.get_vocab())
    words = [word[1:] for word in vocabulary if word[0] == "Ġ" and word[1:].isalpha()]
    text = "".join(" " + rng.choice(words) for _ in range(tokens))
    assert len(tokenizer(text)["input_ids"]) == tokens
    return text
