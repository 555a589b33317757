"""The same settings give the same bits; what could not is an error that names it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from launchers import deepspeed_launcher, outside_ranks
from safetensors.torch import load_file

from vtfast.config import load_config
from vtfast.data import splits
from vtfast.distributed.determinism import (
    DETERMINISTIC_ENV,
    flash_attn_kwargs,
    is_deterministic,
    make_deterministic,
    require_full_size,
)
from vtfast.report.tracking import MEASURED
from vtfast.trainer import Trainer
from vtfast.utils.errors import UserError

ROOT = Path(__file__).parents[2]
SHORT = {
    "max_steps": 3,
    "eval_data": None,
    "num_generations": 4,
    "max_completion_length": 16,
    "per_device_train_batch_size": 4,
    "warmup_steps": 0,
}


@pytest.fixture
def restored(monkeypatch):
    """The process as it was, afterwards."""
    for name in DETERMINISTIC_ENV:
        monkeypatch.setenv(name, "")  # so that it is put back, whatever is set meanwhile
        monkeypatch.delenv(name)
    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
    monkeypatch.setattr(cudnn, "deterministic", cudnn.deterministic)
    monkeypatch.setattr(cudnn, "benchmark", cudnn.benchmark)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def result(folder: Path) -> tuple[list[dict], str, dict[str, torch.Tensor]]:
    """What a run promises to repeat: metrics, completions, the last weights."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [{name: x for name, x in line.items() if not name.startswith(MEASURED)} for line in lines]
    weights = load_file(folder / "checkpoints" / "step-3" / "model.safetensors")
    return metrics, (folder / "completions.jsonl").read_text(), weights


def assert_equal(one: Path, other: Path) -> None:
    (metrics, completions, weights), others = result(one), result(other)
    assert len(metrics) == 3 and metrics[0]["grad_norm"] > 0
    for line in metrics:  # without a KL, a step in which no group has a signal has no gradient
        assert (line["grad_norm"] > 0) == (line["frac_groups_skipped"] < 1)
    assert metrics == others[0]
    assert completions == others[1]
    assert weights.keys() == others[2].keys()
    for name, value in weights.items():
        assert value.equal(others[2][name]), name


def test_two_runs_are_bitwise_equal_with_the_flag_and_without(tmp_path, restored, monkeypatch):
    monkeypatch.setattr(splits, "SYNTHETIC_TRAIN", 64)

    def run(name: str, **settings) -> Path:
        settings = SHORT | {"beta": 0.04, "output_dir": str(tmp_path / name)} | settings
        return Trainer(load_config(overrides=settings)).run()

    plain = run("plain")
    assert not is_deterministic()
    one, two = run("one", deterministic=True), run("two", deterministic=True)
    assert is_deterministic()
    assert_equal(one, two)
    assert_equal(one, plain)
    with pytest.raises(AssertionError):
        assert_equal(one, run("other", seed=1, deterministic=True))
    config = yaml.safe_load((one / "config.yaml").read_text())
    assert config["cpu_threads"] == torch.get_num_threads()


def launch(folder: Path, environment: dict, *flags: str, ranks: int) -> Path:
    """A run under the real launcher, in another environment."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher = list(deepspeed_launcher(ranks))
    settings = SHORT | {"per_device_train_batch_size": 4 // ranks, "output_dir": folder}
    settings |= {"deterministic": True, "cpu_threads": 2}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [*launcher, str(ROOT / "train.py"), *words, *flags],
        capture_output=True,
        text=True,
        env=outside_ranks() | {"DS_ACCELERATOR": "cpu", "PATH": path} | environment,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "beta"), [(1, "0"), (2, "0"), (2, "0.04")])
def test_the_environment_changes_nothing(tmp_path, ranks, beta):
    """Neither Python's hash seed nor the threads that OpenMP would have taken: `cpu_threads` decides."""
    for number in ("1", "2"):
        environment = {"PYTHONHASHSEED": number, "OMP_NUM_THREADS": number}
        launch(tmp_path / number, environment, "--beta", beta, ranks=ranks)
    assert_equal(tmp_path / "1", tmp_path / "2")


def test_an_operation_without_an_ordered_way_is_an_error_that_names_it(restored):
    make_deterministic(cuda=False)
    with pytest.raises(RuntimeError, match="put_"):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark


def test_the_environment_of_cuda(restored, monkeypatch):
    make_deterministic(cuda=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["NCCL_ALGO"] == "Ring"
    monkeypatch.setenv("NCCL_ALGO", "^NVLS")
    make_deterministic(cuda=True)
    monkeypatch.setenv("NCCL_ALGO", "NVLS")
    with pytest.raises(UserError, match=r"NCCL_ALGO=NVLS is not deterministic; .* Ring"):
        make_deterministic(cuda=True)


def test_flash_attention_is_told(restored):
    def able(query, deterministic=False): ...

    def unable(query): ...

    assert flash_attn_kwargs(able) == flash_attn_kwargs(unable) == {}
    make_deterministic(cuda=False)
    assert flash_attn_kwargs(able) == {"deterministic": True}
    with pytest.raises(UserError, match="no deterministic backward"):
        flash_attn_kwargs(unable)


def test_free_memory_decides_nothing(restored):
    require_full_size(10, 9, "cache pages", "--rollout_cache_tokens")
    make_deterministic(cuda=False)
    require_full_size(10, 10, "cache pages", "--rollout_cache_tokens")
    with pytest.raises(UserError, match=r"9 of 10 cache pages.*--rollout_cache_tokens"):
        require_full_size(10, 9, "cache pages", "--rollout_cache_tokens")


def test_vllm_is_refused():
    with pytest.raises(UserError, match="--deterministic true: vLLM"):
        load_config(overrides={"deterministic": True, "use_vllm": True})
