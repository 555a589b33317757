"""A disk without room stops a run or does not, as it was told, and never costs the last checkpoint."""

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from launchers import outside_ranks
from whole_runs import assert_same_run, build, run, step, steps, truncate

from vtfast.report.tracking import JsonLinesWriter, Tracker
from vtfast.training import loop
from vtfast.training.checkpoint import checksums as files
from vtfast.training.checkpoint import save
from vtfast.utils.errors import UserError


def full(at: int):
    """`save_file` on a disk that is full at step `at`, half of the file written."""
    calls, write = [], save.save_file

    def save_file(tensors, path, **options):
        calls.append(path)
        write(tensors, path, **options)
        if len(calls) == at:
            truncate(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    return save_file


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_stops_the_run_and_spares_the_last_checkpoint(background, tmp_path, sft, monkeypatch):
    monkeypatch.setattr(save, "save_file", full(at=3))
    trainer = build(output_dir=str(tmp_path / "run"), async_save=background, **sft)
    with pytest.raises(UserError, match=r"step-3: cannot be written: .*No space left.*step-2 is intact"):
        trainer.run()
    assert steps(tmp_path / "run") == ["step-1", "step-2"]
    assert files.find_damage(step(tmp_path / "run", 2)) is None


def test_a_full_disk_need_not_stop_the_run(tmp_path, whole, sft, monkeypatch, caplog):
    monkeypatch.setattr(save, "save_file", full(at=3))
    run(tmp_path / "run", on_save_error="continue", **sft)
    assert steps(tmp_path / "run") == ["step-1", "step-2", "step-4"]
    assert "the run continues" in caplog.text
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.parametrize("answer", ["stop", "continue"])
def test_a_full_disk_for_the_logs(answer, tmp_path, sft, caplog, monkeypatch):
    """The kernel's own full device, at step 2."""
    trainer = build(output_dir=str(tmp_path / "run"), on_save_error=answer, **sft)
    log_step = loop.log_step

    def fill(session, tracker, result):
        if session.step == 2:
            tracker.metrics_file = JsonLinesWriter(Path("/dev/full"))
        log_step(session, tracker, result)

    monkeypatch.setattr(loop, "log_step", fill)
    if answer == "stop":
        with pytest.raises(UserError, match="step 2: /dev/full: cannot be written: No space left"):
            trainer.run()
        assert steps(tmp_path / "run") == ["step-1"]
    else:
        with pytest.raises(UserError, match=r"step-4: the trained weights could not be saved; .*step-1 is"):
            trainer.run()
        assert (trainer.session.folder / "report.html").is_file()
        assert not (trainer.session.folder / "completed.json").exists()
        assert "step 4: /dev/full" in caplog.text and "the rows of its last steps are lost" in caplog.text
        assert steps(tmp_path / "run") == ["step-1"], "no checkpoint is ahead of its logs"


def test_a_disk_that_has_room_again_gets_all_rows(tmp_path):
    """The kernel refuses in the middle of a row, twice, and takes up again."""
    tracker = Tracker(SimpleNamespace(report_to=[]), tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    wanted = [{"step": n, "text": "x" * 700} for n in range(1, 5) for _ in range(40)]
    for number in range(1, 5):
        try:
            if number in (2, 3):
                resource.setrlimit(resource.RLIMIT_FSIZE, (33_000, before[1]))
            tracker.log(number, {"step": number}, [r for r in wanted if r["step"] == number])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert bool(tracker.problem) == (number in (2, 3))
        if tracker.problem:
            with pytest.raises(OSError, match=r"completions\.jsonl: cannot be written"):
                tracker.flush()
    tracker.close()
    lines = (tmp_path / "completions.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == wanted
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_tracker_without_room_ends_and_the_run_does_not(tmp_path, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    tracker = Tracker(SimpleNamespace(report_to=[]), tmp_path)
    tracker.sinks["tensorboard"] = SimpleNamespace(id=None, log=full, close=full)
    tracker.log(1, {"step": 1}, [])
    tracker.log(2, {"step": 2}, [])
    tracker.flush()
    tracker.close()
    assert caplog.text.count("--report_to tensorboard: its curves end here") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_mistake_of_ours_is_no_full_disk(tmp_path, sft, monkeypatch):
    def broken(*_, **__):
        raise TypeError("a bug")

    monkeypatch.setattr(save, "save_file", broken)
    trainer = build(output_dir=str(tmp_path / "run"), on_save_error="continue", **sft)
    with pytest.raises(TypeError, match="a bug"):
        trainer.run()


def test_a_real_limit_in_the_middle_of_a_file(tmp_path, questions):
    """The kernel refuses to let any file grow beyond 300 kB: the optimizer's does not fit."""
    script = (
        "import resource, sys\n"
        "from vtfast.training.checkpoint.save import Saver\n"
        "start = Saver.start\n"
        "def begin(self, step, *rest):\n"
        "    if step == 2:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        "    start(self, step, *rest)\n"
        "Saver.start = begin\n"
        "from vtfast.cli.main import main\n"
        "sys.exit(main(['sft', *sys.argv[1:]]))\n"
    )
    flags = (
        {"max_steps": 3, "save_steps": 1, "eval_data": "none", "report_to": "none"}
        | questions
        | {"eval_data": "none", "output_dir": tmp_path / "run", "per_device_train_batch_size": 2}
    )
    command = [sys.executable, "-c", script, *(f"--{name}={value}" for name, value in flags.items())]
    done = subprocess.run(command, env=outside_ranks(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "step-2: cannot be written" in done.stderr and "step-1 is intact" in done.stderr
    assert steps(tmp_path / "run") == ["step-1"] and files.find_damage(step(tmp_path / "run", 1)) is None
