"""Long runs of tiny steps: neither memory nor open files grow, in the trainer and in the processes of its rewards."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from vtfast.data.synthetic import write_dataset

ROOT = Path(__file__).parents[2]
LIMIT = 0.02
"""Growth that is allowed, from the end of the warm-up to the end of the run."""
TINY = {
    "eval_data": "none",
    "num_generations": 2,
    "per_device_train_batch_size": 2,
    "max_completion_length": 8,
    "learning_rate": 1e-5,
    "report_to": "tensorboard",
    "cpu_threads": 1,
}
OWN_REWARDS = '''
import os


def resident(completion, sample):
    """Gigabytes of the process that scores: a run's reward, so that metrics.jsonl tells of it."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9


def descriptors(completion, sample):
    return len(os.listdir("/proc/self/fd"))
'''


def soak(folder: Path, steps: int, **settings: object) -> list[dict]:
    """The metrics of a run of `steps` steps in a process of its own."""
    write_dataset(folder / "data", train=64, val=1, seed=0)
    (folder / "own_rewards.py").write_text(OWN_REWARDS)
    paths = {"data": folder / "data" / "train.parquet", "output_dir": folder / "run"}
    given = TINY | {"max_steps": steps} | paths | settings
    flags = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    path = f"{os.environ.get('PYTHONPATH', '')}{os.pathsep}{folder}"
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *flags],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == steps
    return [json.loads(line) for line in lines]


def growth(values: Sequence[float]) -> float:
    """By what share the last sixth of the values is above the sixth that follows the first third, by their medians."""
    window = len(values) // 6
    after_warm_up = values[len(values) // 3 :][:window]
    return statistics.median(values[-window:]) / statistics.median(after_warm_up) - 1


def test_growth_sees_a_leak_and_no_noise():
    steady = [1.0 + 0.01 * (step % 3) for step in range(300)]
    warming = [0.5 + 0.005 * min(step, 99) for step in range(300)]
    leaking = [1.0 + 0.0002 * step for step in range(300)]  # 6% in all
    spikes = [value + 5 * (step % 50 == 0) for step, value in enumerate(steady)]
    assert all(abs(growth(values)) < 0.001 for values in (steady, warming, spikes))
    assert growth(leaking) > LIMIT
    assert growth([10] * 150 + [11] * 150) > LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_300_steps_grow_nothing(tmp_path, background):
    settings = {"save_steps": 25, "save_total_limit": 2, "beta": 0.04, "async_save": background}
    metrics = soak(tmp_path, 300, **settings)
    for name in ("resident_gb", "open_files"):
        values = [line[name] for line in metrics]
        assert min(values) > 0 and growth(values) <= LIMIT, (name, growth(values))
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 2


@pytest.mark.slow
def test_the_processes_of_a_users_rewards_grow_neither(tmp_path):
    names = ["own_rewards:resident", "own_rewards:descriptors"]
    metrics = soak(tmp_path, 100, reward_funcs=",".join(names), reward_workers=2, save_steps=0)
    for name in [*(f"rewards/{name}" for name in names), "resident_gb", "open_files"]:
        values = [line[name] for line in metrics]
        assert min(values) > 0 and growth(values) <= LIMIT, (name, growth(values))
    assert all(line["rewards/failed"] == 0 for line in metrics)
