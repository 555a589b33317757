"""What every contestant of `bench step` is given: a checkpoint, questions with images, a reward, and an optimizer."""

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
"""Above every image here: none is resized."""


@dataclass(frozen=True)
class Optimizer:
    learning_rate: float = 1e-6
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class Task:
    """The same for all: files of a checkpoint and of questions, and how to learn from them."""

    shape: Shape
    folder: Path
    device: str
    dtype: torch.dtype
    questions: tuple[str, ...]
    threads: int
    optimizer: Optimizer = Optimizer()
    answers: tuple[tuple[tuple[int, ...], ...], ...] | None = None
    """Token ids [prompt][G] that every contestant takes in place of its samples; None samples."""

    @property
    def checkpoint(self) -> Path:
        return self.folder / "model"

    def image(self, prompt: int) -> Path:
        return self.folder / f"{prompt}.png"

    def text(self, prompt: int) -> str:
        return IMAGE + self.questions[prompt]


@contextmanager
def make_task(shape: Shape, device: str, threads: int, dtype: torch.dtype) -> Iterator[Task]:
    """Random weights at the sizes of `shape`, one question and one image of noise a prompt, in a folder of its own."""
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
        module.generation_config = GenerationConfig()  # no end token: every answer is full length
        module.save_pretrained(folder / "model")
        del module  # the device's memory is the contestants'
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


def planted_answers(shape: Shape) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Ordinary tokens at random: what `Task.answers` holds where contestants are to learn the same."""
    rng, words = random.Random(1), min(SPECIAL_IDS.values())
    return tuple(
        tuple(tuple(rng.randrange(words) for _ in range(shape.completion)) for _ in range(shape.G)) for _ in shape.text
    )


def variety(completion: str, sample: object = None) -> float:
    """The reward: how many different characters an answer has. A function of the text alone, and hardly ever equal
    for a whole group, so that there is something to learn from random weights."""
    return len(set(completion)) / 10


def _question(tokenizer, tokens: int, rng: random.Random) -> str:
    """Words that are one token each."""
    vocabulary = sorted(tokenizer.get_vocab())
    words = [word[1:] for word in vocabulary if word[0] == "Ġ" and word[1:].isalpha()]
    text = "".join(" " + rng.choice(words) for _ in range(tokens))
    assert len(tokenizer(text)["input_ids"]) == tokens
    return text
