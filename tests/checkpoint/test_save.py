"""What a save holds to while other things go wrong: an error, a damaged neighbour, a machine that goes down."""

import errno
import os
import re
import threading
from pathlib import Path

import pytest
import torch
from whole_runs import build, flip, run, step, steps

from vtfast.distributed.ranks import Ranks
from vtfast.training.checkpoint import checksums as files
from vtfast.training.checkpoint import save
from vtfast.training.checkpoint.save import Saver
from vtfast.utils.errors import SharedError, UserError

# An error beside a checkpoint that is being written


def fails_in_step_2(folder: Path, monkeypatch, error: BaseException, problem=None, **settings):
    """A run whose second step fails before anything of the first one's checkpoint is on the disk."""
    failing, write = threading.Event(), save.save_file

    def late(*arguments, **options):
        assert failing.wait(60)
        if problem:
            raise problem
        write(*arguments, **options)

    monkeypatch.setattr(save, "save_file", late)
    trainer = build(output_dir=str(folder), async_save=True, **settings)
    one_step = trainer.step

    def fail(number, asked):
        if number == 2:
            failing.set()
            raise error
        return one_step(number, asked)

    trainer.step = fail
    return trainer


@pytest.mark.parametrize("error", [UserError("a bad row"), RuntimeError("a bug"), KeyboardInterrupt()], ids=repr)
def test_an_error_does_not_lose_the_checkpoint_that_is_being_written(error, tmp_path, sft, monkeypatch):
    trainer = fails_in_step_2(tmp_path / "run", monkeypatch, error, **sft)
    with pytest.raises(type(error)) as raised:
        trainer.run()
    assert raised.value is error
    assert steps(tmp_path / "run") == ["step-1"]
    assert files.find_damage(step(tmp_path / "run", 1)) is None
    monkeypatch.undo()
    again = build(output_dir=str(tmp_path / "run"), resume_from_checkpoint="last", **sft)
    assert again.session.step == 1


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "step-1: cannot be written: .*No space"),
        (TypeError("ours"), "lost, too: ours"),
    ],
)
def test_a_save_that_fails_too_is_said_and_hides_nothing(problem, said, tmp_path, sft, monkeypatch, caplog):
    trainer = fails_in_step_2(tmp_path / "run", monkeypatch, UserError("first"), problem, **sft)
    with pytest.raises(UserError, match=r"^first$"):
        trainer.run()
    assert steps(tmp_path / "run") in ([], [".step-1.partial"])
    (record,) = [r for r in caplog.records if r.levelname == "ERROR"]
    assert re.search(said, record.getMessage())
    assert bool(record.exc_info) == isinstance(problem, TypeError), "a bug keeps its traceback"


class Gathering(Ranks):
    """One of two ranks, which counts how often it waits for the other."""

    def gather(self, value):
        WAITED.append(value)
        return [value, value]

    def from_main(self, value):
        return value


WAITED: list = []


def pending(folder: Path) -> Saver:
    """A saver of one of two ranks with step 3 on its way."""
    WAITED.clear()
    saver = Saver(folder, Gathering(0, 2, torch.device("cpu")), background=True)
    saver.last = 2
    (folder / ".step-3.partial" / "resume").mkdir(parents=True)
    saver.pending = 3, saver._thread.submit(lambda: ({}, None))
    return saver


def test_several_ranks_end_a_save_together_or_not_at_all(tmp_path, caplog):
    """A rank that fails alone cannot wait for the others: they are in some other collective, or gone."""
    pending(tmp_path / "alone").finish(UserError("a row that only this rank has"))
    assert not WAITED
    assert "step-3: was being written, and is lost; the last checkpoint: step-2" in caplog.text
    saver = pending(tmp_path / "together")
    saver.finish(SharedError("a full disk"))
    assert len(WAITED) == 1 and saver.last == 3
    assert [path.name for path in (tmp_path / "together").iterdir()] == ["step-3"]
    saver.finish(SharedError("again"))
    assert len(WAITED) == 1, "nothing is being written any more"


# --save_total_limit


@pytest.mark.parametrize("damage", [flip, Path.unlink], ids=["a bit", "a file gone"])
def test_a_damaged_checkpoint_pushes_no_whole_one_out(damage, tmp_path, sft, caplog):
    """Step 3's is damaged while step 4 runs. Two whole ones are to be kept, and there are two: 4 and 2."""
    trainer = build(output_dir=str(tmp_path), save_total_limit=2, **sft | {"max_steps": 6})
    one_step, seen = trainer.step, []

    def spoil(number, asked):
        seen.append(steps(tmp_path))
        if number == 4:
            damage(step(tmp_path, 3) / "model.safetensors")
        return one_step(number, asked)

    trainer.step = spoil
    trainer.run()
    assert seen[3:] == [["step-2", "step-3"], ["step-2", "step-3", "step-4"], ["step-4", "step-5"]]
    assert steps(tmp_path) == ["step-5", "step-6"]
    assert caplog.text.count("it does not count for --save_total_limit") == 1
    assert "step-3: model.safetensors is" in caplog.text


def test_whole_checkpoints_are_not_read_again_at_every_save(tmp_path, sft, monkeypatch):
    """Those of this process, and the one that it goes on from; others once."""
    run(tmp_path, **sft | {"max_steps": 3})
    read = []
    monkeypatch.setattr(save, "find_damage", lambda folder: read.append(folder.name) or files.find_damage(folder))
    settings = sft | {"max_steps": 5, "save_total_limit": 3, "resume_from_checkpoint": "last"}
    run(tmp_path, **settings)
    assert steps(tmp_path) == ["step-3", "step-4", "step-5"] and read == ["step-2"]


# A checkpoint is never ahead of the logs


def test_all_logs_are_on_the_disk_before_a_checkpoint_is(tmp_path, sft, monkeypatch):
    trainer = build(output_dir=str(tmp_path), **sft | {"max_steps": 2})
    flushed, fsync = [], os.fsync

    def watched(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        flushed.append(path.relative_to(tmp_path).as_posix())
        fsync(descriptor)

    one_step = trainer.step

    def left_out(number, asked):
        result = one_step(number, asked)
        trainer.session.skip_log.write(tmp_path, [{"step": number, "row": 1, "reason": "planted"}])
        trainer.session.updater.skip_empty(number)
        return result

    trainer.step = left_out
    monkeypatch.setattr(os, "fsync", watched)
    trainer.run()
    logs = ["completions.jsonl", "metrics.jsonl", "nonfinite.jsonl", "skipped.jsonl"]
    ends = [i for i, name in enumerate(flushed) if name.endswith("partial/resume/state.json")]
    assert len(ends) == 2
    for begin, end in zip((0, ends[0]), ends, strict=True):
        assert sorted(name for name in flushed[begin:end] if name.endswith(".jsonl")) == logs
        assert "." in flushed[begin:end], "the names of the files, too"
