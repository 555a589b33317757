"""Small files of every benchmark, the shipped model, a run folder, and a stand-in for the engine."""

import shutil
from pathlib import Path

import pytest
import yaml
from make_benchmarks import write_all

from vtfast.data.processor import Processor
from vtfast.evaluate import run_benchmark
from vtfast.model.loading import load_model
from vtfast.rollout import Completion


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> dict[str, Path]:
    return write_all(tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture(scope="session")
def base(base_path):
    return load_model(base_path)


@pytest.fixture
def run_folder(tmp_path, base_path) -> Path:
    """A run with one checkpoint, whose images were limited to 4 merged tokens."""
    run = tmp_path / "run"
    shutil.copytree(base_path, run / "checkpoints" / "step-100")
    (run / "config.yaml").write_text(
        yaml.safe_dump({"template": "r1-zero", "literal_image": True, "min_pixels": 784, "max_pixels": 784})
    )
    return run


class Oracle:
    """In the engine's place: answers (A) to every prompt, or what `say` makes of its text. `calls`: batch sizes."""

    def __init__(self, policy) -> None:
        pass

    say = staticmethod(lambda prompt: "so</think> <answer>(A)</answer>")
    calls: list[int]

    def generate(self, prompts, num_generations, sampling, progress=False):
        assert num_generations == 1 and sampling.greedy
        Oracle.calls.append(len(prompts))
        tokenize = Oracle.processor.tokenizer
        texts = [Oracle.say(prompt.text) for prompt in prompts]
        return [[Completion(tokenize(text)["input_ids"], [], "stop")] for text in texts]


@pytest.fixture
def oracle(monkeypatch, base_path):
    monkeypatch.setattr(run_benchmark, "RolloutEngine", Oracle)
    monkeypatch.setattr(Oracle, "processor", Processor.from_pretrained(base_path), raising=False)
    monkeypatch.setattr(Oracle, "calls", [], raising=False)
    return Oracle
