"""Ranks that are lost, under the real launchers: the run ends in time, with a message and an exit code, and leaves no
process behind. The watchdog itself is tested in test_watchdog.py."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from launchers import deepspeed_launcher, free_port, outside_ranks

from vtfast.cli.main import BAD_INPUT, RANK_LOST
from vtfast.config import field_names, load_config
from vtfast.utils.errors import UserError

ROOT = Path(__file__).parents[2]
LIMIT = 15
"""--rank_timeout of these runs, in seconds. Above what an import may keep Python from doing anything else."""
FLAGS = [
    "--max_steps",
    "4",
    "--num_generations",
    "4",
    "--max_completion_length",
    "16",
    "--per_device_train_batch_size",
    "2",
    "--eval_data",
    "none",
    "--reward_timeout",
    "5",
    "--rank_timeout",
    str(LIMIT),
    "--save_steps",
    "1",
]
PLANT = """
import os, signal, sys, time
import torch
from vtfast.trainer import Trainer
from vtfast.training import setup
from vtfast.training.checkpoint.save import Saver
where, who, what = os.environ["PLANT"].split(maxsplit=2)
def strike():
    if os.environ["RANK"] == who and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        print(f"struck at {time.time()}", flush=True)
        exec(what)
def planted(kind, name, step=None):
    method = getattr(kind, name)
    def instead(*arguments):
        if step is None or step in arguments:
            strike()
        return method(*arguments)
    setattr(kind, name, instead)
{"start": lambda: planted(setup, "resolve_max_steps"),
 "rollout": lambda: planted(Trainer, "sample", step=3),
 "update": lambda: planted(Trainer, "update"),
 "save": lambda: planted(Saver, "start", step=2)}[where]()
from vtfast.cli.main import main
sys.exit(main(["train", *sys.argv[1:]]))
"""


def launch(tmp_path: Path, plant: str, *flags: str, launcher: list[str]) -> tuple[int, str, float]:
    """-> (exit code, all that was said, seconds from the blow to the launcher's end). Nothing may be left behind."""
    script = tmp_path / "planted.py"
    script.write_text(PLANT)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    process = subprocess.Popen(
        [*launcher, str(script), *FLAGS, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=outside_ranks() | {"DS_ACCELERATOR": "cpu", "PATH": path, "PLANT": plant},
        cwd=tmp_path,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=600)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    ended = time.time()
    left = [p for p in psutil.process_iter(["cmdline"]) if str(script) in (p.info["cmdline"] or [])]
    for orphan in left:
        orphan.kill()
    assert not left
    struck = re.search(r"struck at ([\d.]+)", said)
    assert struck, said[-3000:]
    return process.returncode, said, ended - float(struck[1])


DEEPSPEED = list(deepspeed_launcher())
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
GRACE = 45
"""Seconds that DeepSpeed's launcher takes at most to end a process which does not end by itself."""


@pytest.mark.slow
@pytest.mark.parametrize(("where", "rank"), [("rollout", 0), ("update", 1)])
def test_a_killed_rank(tmp_path, rank, where):
    code, said, seconds = launch(tmp_path, f"{where} {rank} {KILL}", launcher=DEEPSPEED)
    assert code != 0 and seconds < GRACE
    assert re.search(rf"error: rank {rank} \(host \S+, pid \d+\) died; last heard \d s ago", said)
    assert "Traceback" not in said and said.count("error: rank") == 1


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank(tmp_path, rank):
    stop = f"rollout {rank} os.kill(os.getpid(), signal.SIGSTOP)"
    code, said, seconds = launch(tmp_path, stop, launcher=DEEPSPEED)
    assert code == RANK_LOST and LIMIT <= seconds < 2 * LIMIT + GRACE
    assert re.search(rf"error: rank {rank} \(host .* has not been heard for \d\d s", said)


@pytest.mark.slow
def test_a_rank_whose_main_thread_hangs(tmp_path):
    code, said, seconds = launch(tmp_path, "rollout 1 time.sleep(999)", launcher=DEEPSPEED)
    assert code == RANK_LOST and LIMIT <= seconds < 2 * LIMIT + GRACE
    assert re.search(
        r"error: rank 1 .* has been in step 3, rollout for 1\d s without progress \(--rank_timeout 15\), at", said
    )


@pytest.mark.slow
def test_a_rank_that_raises(tmp_path):
    code, said, seconds = launch(tmp_path, "update 1 raise torch.OutOfMemoryError('planted')", launcher=DEEPSPEED)
    assert code in (1, RANK_LOST) and seconds < GRACE
    assert re.search(r"error: rank 1 .* failed in step 1, update: OutOfMemoryError: planted", said)
    assert "gloo" not in said


@pytest.mark.slow
def test_a_long_start_and_a_long_save_are_no_hang(tmp_path):
    """Twice as long as --rank_timeout; the other rank waits in a collective meanwhile."""
    for number, where in enumerate(["start", "save"]):
        folder = tmp_path / f"run-{number}"
        code, said, _ = launch(
            tmp_path, f"{where} 1 time.sleep({2 * LIMIT})", "--output_dir", str(folder), launcher=DEEPSPEED
        )
        assert code == 0, said[-3000:]
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.slow
def test_torchrun_starts_lost_ranks_again(tmp_path):
    """The restarted ranks find new connections and a run folder, and train to the end."""
    torchrun = ["torchrun", "--nproc_per_node", "2", "--max-restarts", "2", "--master-port", str(free_port())]
    resume = ["--output_dir", str(tmp_path / "run"), "--resume_from_checkpoint", "last"]
    if "resume_from_checkpoint" not in field_names():
        resume = []  # a folder of its own for each attempt
    code, said, _ = launch(tmp_path, f"rollout 1 {KILL}", *resume, launcher=torchrun)
    assert code == 0, said[-3000:]
    assert re.search(r"error: rank 1 .* died", said)
    last = tmp_path / "run" if resume else tmp_path / "runs" / "tiny-spatial-2"
    lines = [json.loads(line) for line in (last / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert yaml.safe_load((last / "config.yaml").read_text())["rank_timeout"] == LIMIT


def test_the_settings():
    config = load_config()
    assert (config.ddp_timeout, config.rank_timeout) == (1800, 600)
    for wrong, message in {
        "ddp_timeout=0": "must be at least 1",
        "rank_timeout=-1": "must not be negative",
        "rank_timeout=10": "must be above --reward_timeout 10",
    }.items():
        name, value = wrong.split("=")
        with pytest.raises(UserError, match=f"--{name} .*{message}"):
            load_config(overrides={name: value})
    assert load_config(overrides={"rank_timeout": 0}).rank_timeout == 0
    assert len({0, 1, 130, BAD_INPUT, RANK_LOST}) == 5
