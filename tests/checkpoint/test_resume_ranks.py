"""Resuming under DeepSpeed's own launcher: on as many ranks as before, on more, on fewer, and after a signal."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launchers import ROOT, deepspeed_launcher, environment
from safetensors import safe_open
from safetensors.torch import load_file
from whole_runs import assert_same_run, rows, unequal, weights

pytestmark = pytest.mark.slow

TWO = deepspeed_launcher()
FLAGS = [
    "--max_steps",
    "4",
    "--eval_data",
    "none",
    "--num_generations",
    "4",
    "--max_completion_length",
    "12",
    "--save_steps",
    "1",
    "--warmup_steps",
    "2",
    "--beta",
    "0.04",
    "--report_to",
    "none",
]


def command(folder: Path, ranks: int, *flags: str, script: Path = ROOT / "train.py") -> list[str]:
    launcher = TWO if ranks == 2 else (sys.executable,)
    batch = ["--per_device_train_batch_size", str(4 // ranks)]
    return [*launcher, str(script), *FLAGS, *batch, "--output_dir", str(folder), *flags]


def run(folder: Path, ranks: int, *flags: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(folder, ranks, *flags, **options),
        capture_output=True,
        text=True,
        env=environment(),
        cwd=ROOT,
        timeout=280,
    )


def killer(folder: Path, rank: int, step: int) -> Path:
    """train.py, but `rank` gets a SIGKILL in the backward pass of `step`."""
    script = folder / "killer.py"
    script.write_text(
        "import os, signal, sys\n"
        "from vtfast.training.update import Updater\n"
        "update = Updater.update\n"
        "def planted(self, step, *rest):\n"
        f"    if step == {step} and self.ranks.rank == {rank}:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return update(self, step, *rest)\n"
        "Updater.update = planted\n"
        "from vtfast.cli import main\n"
        "sys.exit(main(['train', *sys.argv[1:]]))\n"
    )
    return script


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that nobody ended, by number of ranks."""
    folder = tmp_path_factory.mktemp("whole")
    for ranks in (1, 2):
        done = run(folder / str(ranks), ranks)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_of_two_ranks_is_killed(whole, tmp_path, dtype):
    expected, flags = whole / "2", ["--dtype", dtype]
    if dtype == "bfloat16":  # the dtype of every GPU run
        expected = tmp_path / "whole"
        assert run(expected, 2, *flags).returncode == 0
    done = run(tmp_path / "run", 2, *flags, script=killer(tmp_path, rank=1, step=3))
    assert done.returncode != 0 and len(rows(tmp_path / "run")) == 2
    done = run(tmp_path / "run", 2, *flags, "--resume_from_checkpoint", "last")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(expected, tmp_path / "run")


def optimizer(step: Path) -> dict[str, torch.Tensor]:
    """Masters and moments of a checkpoint, put together from all ranks."""
    result = {}
    for path in sorted((step / "resume").glob("rank-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            places = json.loads(file.metadata()["places"])
        for key, piece in load_file(path).items():
            if "/" in key:
                place = places[key.partition("/")[2]]
                whole = torch.full(place["shape"], torch.nan).flatten()
                result.setdefault(key, whole)[place["start"] :][: len(piece)] = piece
    return result


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1)])
def test_another_number_of_ranks_goes_on(whole, tmp_path, before, after):
    """The optimizer's state is the same to the bit; what follows is the same up to rounding."""
    script = tmp_path / "resave.py"
    script.write_text(
        "import sys\n"
        "from vtfast.training import loop\n"
        "train = loop.train\n"
        "def save_first(trainer, tracker):\n"
        "    loop.save(trainer.session, tracker)\n"
        "    train(trainer, tracker)\n"
        "loop.train = save_first\n"
        "from vtfast.cli import main\n"
        "sys.exit(main(['train', *sys.argv[1:]]))\n"
    )
    source = whole / str(before) / "checkpoints" / "step-2"
    fork = tmp_path / "fork"
    done = run(fork, after, "--resume_from_checkpoint", str(source), script=script)
    assert done.returncode == 0, done.stderr[-3000:]

    saved = fork / "checkpoints" / "step-2"
    assert len(list((saved / "resume").glob("rank-*"))) == after
    expected = optimizer(source)
    assert unequal(expected, optimizer(saved)) == []
    assert {key.partition("/")[0] for key in expected} == {"fp32", "exp_avg", "exp_avg_sq"}
    assert not any(value.isnan().any() for value in expected.values())
    assert unequal(*(load_file(step / "model.safetensors") for step in (source, saved))) == []

    assert [row["step"] for row in rows(fork)] == [1, 2, 3, 4]
    found = weights(fork, 4)
    for name, value in weights(whole / str(before), 4).items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=2e-6, msg=name)


def test_a_signal_to_one_rank_stops_both(whole, tmp_path):
    """As DeepSpeed's launcher sends them: one rank after the other. The run saves, and ends with code 75."""
    process = subprocess.Popen(
        command(tmp_path / "run", 2, "--max_steps", "400", "--save_steps", "0"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        wait_for(lambda: len(rows(tmp_path / "run")) >= 2, tmp_path / "run" / "metrics.jsonl")
        os.kill(rank_of(process.pid, rank=1), signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 75, err[-3000:]
    done = len(rows(tmp_path / "run"))
    assert f"after step {done}; resume with --resume_from_checkpoint last" in err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{done}"]


@pytest.mark.parametrize("kind", ["SharedError", "UserError"])
def test_an_error_while_a_checkpoint_is_being_written(tmp_path, kind):
    """Step 2's files are written only once step 3 has failed: on both ranks, or on one alone."""
    everyone = kind == "SharedError"
    script = tmp_path / "fails.py"
    script.write_text(
        "import sys, threading\n"
        "from vtfast import trainer\n"
        "from vtfast.utils import errors\n"
        "from vtfast.training.checkpoint import save\n"
        "failing, write, step = threading.Event(), save.save_file, trainer.Trainer.step\n"
        "def late(tensors, path, **options):\n"
        "    assert 'step-2' not in str(path) or failing.wait(60)\n"
        "    write(tensors, path, **options)\n"
        "def fails(self, number, questions):\n"
        f"    if number == 3 and ({everyone} or self.session.ranks.is_main):\n"
        "        failing.set()\n"
        f"        raise errors.{kind}('planted')\n"
        "    return step(self, number, questions)\n"
        "save.save_file, trainer.Trainer.step = late, fails\n"
        "from vtfast.cli import main\n"
        "sys.exit(main(['train', *sys.argv[1:]]))\n"
    )
    done = run(tmp_path / "run", 2, "--async_save", "true", script=script)
    assert done.returncode not in (0, None) and "planted" in done.stderr
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")]
    assert sorted(saved) == (["step-1", "step-2"] if everyone else ["step-1"])
    lost = "step-2: was being written, and is lost; the last checkpoint: step-1 is intact"
    assert (lost in done.stderr) == (not everyone)
    done = run(tmp_path / "run", 2, "--resume_from_checkpoint", "last")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4]


def wait_for(condition, path: Path) -> None:
    deadline = time.monotonic() + 240
    while not (path.exists() and condition()):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def rank_of(launcher: int, rank: int) -> int:
    """Process id of a rank."""
    import psutil

    for child in psutil.Process(launcher).children(recursive=True):
        if child.environ().get("RANK") == str(rank) and "train.py" in " ".join(child.cmdline()):
            return child.pid
    raise AssertionError(f"no rank {rank}")
