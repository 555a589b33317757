"""The campaign of faults: that it strikes where it says, that it sees what it is to see, and a short one in full.

`python -m tests.faults` is the long one.
"""

import json
import random
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from faults import verify
from faults.damage import DAMAGES
from faults.places import MAIN_ONLY, PLACES, Moment, Orders
from faults.plan import CRASHES, KINDS, LAUNCHER, TIMER, Trial, plan
from faults.runs import SETTINGS
from safetensors.torch import load_file, save_file

from vtfast.training.checkpoint import checksums as files
from vtfast.training.checkpoint import settings_of
from vtfast.training.checkpoint.logs import set_aside
from vtfast.training.checkpoint.run_folder import check_output_dir

TESTS = Path(__file__).parents[1]
COUNTS = {place: {0: 60} if place in MAIN_ONLY else {0: 60, 1: 50} for place in PLACES}


# The plan


def test_the_plan_is_a_function_of_the_seed_and_spreads_faults_evenly():
    trials = plan(2 * len(KINDS), 5, [1, 2])
    assert trials == plan(2 * len(KINDS), 5, [1, 2]) != plan(2 * len(KINDS), 6, [1, 2])
    assert trials[:7] == plan(7, 5, [1, 2]), "a trial does not depend on how many there are"
    assert {(trial.kind, trial.settings.ranks) for trial in trials} == {
        (kind, ranks) for kind in KINDS for ranks in (1, 2)
    }
    assert [trial.settings.ranks for trial in plan(5, 0, [2])] == [2] * 5
    by_launcher = [trial for trial in trials if trial.launcher]
    assert sorted(trial.kind.name for trial in by_launcher) == sorted(LAUNCHER)
    assert all(trial.settings.ranks == 2 and len(trial.faults) == 1 for trial in by_launcher)


def test_moments_lie_within_the_run():
    for trial in plan(300, 1, [1, 2]):
        ranks = trial.settings.ranks
        counts = {place: dict(list(COUNTS[place].items())[:ranks]) for place in PLACES}
        for start, kind in enumerate(trial.faults):
            assert kind.place == TIMER or kind.place in PLACES
            if kind.place == TIMER:
                continue
            moment = trial.moment(kind, start, counts)
            assert moment == trial.moment(kind, start, counts)
            assert moment.rank in (*range(ranks), None) and 0 <= moment.share < 1
            struck = counts[kind.place].values() if moment.rank is None else [60, 50][moment.rank :][:1]
            assert 1 <= moment.nth <= min(struck)
            if kind.damage and start == 0:
                assert moment.nth >= 25, "there must be a checkpoint to damage"
            if kind.place in MAIN_ONLY:
                assert moment.rank == 0
            assert trial.settings.limit or not kind.needs_limit


def test_ranks_are_struck_alone_and_together():
    trial = Trial(0, KINDS[0], SETTINGS[2], "0")
    struck = Counter(replace(trial, seed=str(seed)).moment(KINDS[0], 0, COUNTS).rank for seed in range(60))
    assert set(struck) == {0, 1, None} and min(struck.values()) > 8
    assert {len(replace(trial, seed=str(seed)).faults) for seed in range(20)} == {1, 2}
    assert all(kind.action != "SIGTERM" for kind in CRASHES)


# Striking

WRITER = """
import os, shutil, sys
from pathlib import Path
from faults.places import Watch, read_orders

run = Path(sys.argv[1])
watch = Watch(read_orders(), rank=0)
watch.watch_files()
for step in (1, 2, 3):
    partial = run / "checkpoints" / f".step-{step}.partial"
    partial.mkdir(parents=True)
    for name in ("a", "b"):
        with (partial / name).open("w") as file:
            file.write("x" * 1000)
            file.flush()
            os.fsync(file.fileno())
    partial.rename(run / "checkpoints" / f"step-{step}")
    if step > 1:
        shutil.rmtree(run / "checkpoints" / f"step-{step - 1}")
(run / "log.new").write_text("not a checkpoint's")
os.replace(run / "log.new", run / "log")
print(dict(watch.counts))
"""


def strike(folder: Path, moment: Moment | None) -> tuple[subprocess.CompletedProcess, dict[str, int]]:
    """Run WRITER; -> (how it ended, {file left below the run folder: bytes})"""
    run = folder / "run"
    orders = Orders(str(folder / "journal"), str(run), moment).encode()
    done = subprocess.run(
        [sys.executable, "-c", WRITER, str(run)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(TESTS)} | orders,
    )
    left = {str(p.relative_to(run)): p.stat().st_size for p in run.rglob("*") if p.is_file()}
    return done, left


def test_places_are_counted(tmp_path):
    done, left = strike(tmp_path, None)
    counts = {"open": 6, "fsync": 6, "rename": 3, "renamed": 3, "drop": 6, "tidy": 1}
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(dict(sorted(counts.items(), key=lambda c: done.stdout.find(c[0]))))
    assert left == {"checkpoints/step-3/a": 1000, "checkpoints/step-3/b": 1000, "log": 18}
    assert (tmp_path / "journal").read_text().splitlines() == [f"landed {n}" for n in (1, 2, 3)]


@pytest.mark.parametrize(
    ("moment", "left"),
    [
        (Moment("open", 4), {"step-1/a": 1000, "step-1/b": 1000, ".step-2.partial/a": 1000}),
        (Moment("fsync", 1, "tear", share=0.25), {".step-1.partial/a": 250}),
        (Moment("fsync", 2), {".step-1.partial/a": 1000, ".step-1.partial/b": 1000}),
        (Moment("rename", 1), {".step-1.partial/a": 1000, ".step-1.partial/b": 1000}),
        (Moment("renamed", 1), {"step-1/a": 1000, "step-1/b": 1000}),
        (Moment("drop", 2), {f"step-{n}/{name}": 1000 for n in (1, 2) for name in "ab"}),
    ],
    ids=lambda value: getattr(value, "place", ""),
)
def test_a_moment_strikes_there(tmp_path, moment, left):
    done, found = strike(tmp_path, moment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert found == {f"checkpoints/{name}": size for name, size in left.items()}
    assert (tmp_path / "journal").read_text().splitlines()[-1] == f"struck 0 {moment.place} {moment.nth}"


def test_other_ranks_are_spared_and_a_notice_is_no_kill(tmp_path):
    done, _ = strike(tmp_path, Moment("open", 1, rank=1))
    assert done.returncode == 0 and "struck" not in (tmp_path / "journal").read_text()
    done, _ = strike(tmp_path, Moment("fsync", 2, "SIGTERM"))
    assert done.returncode == -signal.SIGTERM


# Seeing


@pytest.fixture
def run(tmp_path) -> Path:
    """What a finished run leaves, as far as it is looked at."""
    folder = tmp_path / "run"
    step = folder / "checkpoints" / "step-2"
    (step / "resume").mkdir(parents=True)
    save_file({"w": torch.arange(4.0), "nan": torch.tensor(float("nan"))}, step / "model.safetensors")
    save_file({"exp_avg/w": torch.ones(4)}, step / "resume" / "rank-0.safetensors")
    (step / "config.json").write_text('{"some": "text"}')
    for name in ("state.json", "config.yaml"):
        (step / "resume" / name).write_text("{}\n")
    written = [path for path in step.rglob("*") if path.is_file()]
    files.write_checksums(step, [files.checksums_of(step, written)])
    rows = [{"step": n, "loss": 0.1 * n, "kl": None, "time/step": 1.0 + n} for n in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "completions.jsonl").write_text('{"step": 1}\n')
    return folder


@pytest.mark.parametrize("name", DAMAGES)
def test_every_damage_is_seen_here_and_by_vtfast(run, name):
    step = run / "checkpoints" / "step-2"
    assert verify.whole(run) == [2] and files.find_damage(step) is None
    for number in range(20):
        copy = run.with_name(f"copy-{number}")
        subprocess.run(["cp", "-r", run, copy], check=True)
        DAMAGES[name](copy / "checkpoints" / "step-2", random.Random(number))
        assert verify.whole(copy) == []
        assert verify.leftovers(copy) or files.find_damage(copy / "checkpoints" / "step-2")


def test_differences_are_those_of_training(run, tmp_path):
    other = tmp_path / "other"

    def seen(change) -> list[str]:
        subprocess.run(["rm", "-rf", other], check=True)
        subprocess.run(["cp", "-r", run, other], check=True)
        change()
        return list(verify.differences(run, other))

    def edit(name: str, old: str, new: str) -> None:
        text = (other / name).read_text()
        assert old in text
        (other / name).write_text(text.replace(old, new))

    def one_bit(name: str) -> None:
        path = other / "checkpoints" / "step-2" / name
        values = load_file(path)
        next(iter(values.values())).reshape(-1).view(torch.uint8)[0] ^= 1
        save_file(values, path)

    assert seen(lambda: None) == []
    assert seen(lambda: edit("metrics.jsonl", '"time/step": 2.0', '"time/step": 7.0')) == []
    (loss,) = seen(lambda: edit("metrics.jsonl", "0.2", "0.20000000000000004"))
    assert "step 2: loss is 0.20000000000000004 instead of 0.2" in loss
    assert len(seen(lambda: edit("metrics.jsonl", '"kl": null', '"kl": 0.0'))) == 2
    assert len(seen(lambda: (other / "metrics.jsonl").write_text(""))) == 1
    assert seen(lambda: (other / "completions.jsonl").write_text("")) == ["completions.jsonl differs"]
    assert seen(lambda: (other / "skipped.jsonl").write_text("")) == ["skipped.jsonl differs"]
    for name in ("model.safetensors", "resume/rank-0.safetensors"):
        (line,) = seen(lambda name=name: one_bit(name))
        assert line.startswith("step-2: 1 of 3 tensors differ, " + name)
    (line,) = seen(lambda: (other / "checkpoints/step-2").rename(other / "checkpoints/step-1"))
    assert "steps [1] instead of [2]" in line
    assert list(verify.differences(run, run, stops={1}, limit=1)) == []
    (line,) = verify.differences(run, run, stops={1})
    assert "steps [2] instead of [1, 2]" in line


def test_processes_left_over_are_found():
    sleeper = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
    process = subprocess.Popen(sleeper, env={"VTFAST_TRIAL": "here"}, stdout=subprocess.PIPE, start_new_session=True)
    try:
        process.stdout.readline()
        assert verify.processes("VTFAST_TRIAL=here", set(), patience=0) == [process.pid]
        assert verify.processes("VTFAST_TRIAL=elsewhere", {process.pid}, patience=0) == [process.pid]
        assert verify.processes("VTFAST_TRIAL=elsewhere", {-1}, patience=0) == []
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert verify.processes("VTFAST_TRIAL=here", {process.pid}, patience=0) == []


# What the campaign has found


@pytest.mark.parametrize("content", ["", "beta: 7\n"])
def test_settings_of_a_damaged_checkpoint_are_not_taken(run, content):
    older, newer = run / "checkpoints" / "step-2", run / "checkpoints" / "step-4"
    subprocess.run(["cp", "-r", older, newer], check=True)
    assert settings_of("last", str(run)) == newer / "resume" / "config.yaml"
    (newer / "resume" / "config.yaml").write_text(content)
    assert settings_of("last", str(run)) == older / "resume" / "config.yaml"
    (older / files.CHECKSUMS).unlink()
    assert settings_of("last", str(run)) is None
    (run / "config.yaml").write_text("beta: 0\n")
    assert settings_of("last", str(run)) == run / "config.yaml"


def test_a_start_killed_while_it_sets_a_run_aside_can_be_made_again(run, monkeypatch, tmp_path):
    (run / "config.yaml").write_text("beta: 0\n")
    (run / "checkpoints" / ".step-4.partial").mkdir()
    (run / ".metrics.jsonl.partial").write_text("half a li")
    (run / ".stop").touch()
    (run / "superseded-1").mkdir()
    (run / "superseded-1" / ".metrics.jsonl.partial").write_text("")
    wanted = type("Config", (), {"output_dir": str(run), "resume_from_checkpoint": "last"})
    rename, moved = Path.rename, []

    def killed_after(number: int):
        def renamed(self: Path, target: Path) -> Path:
            if len(moved) == number:
                raise KeyboardInterrupt
            moved.append(self.name)
            return rename(self, target)

        return renamed

    for number in range(3):  # each start moves one thing more, and is killed
        monkeypatch.setattr(Path, "rename", killed_after(number + 1))
        with pytest.raises(KeyboardInterrupt):
            set_aside(run)
        check_output_dir(wanted)
    monkeypatch.setattr(Path, "rename", rename)
    set_aside(run)
    check_output_dir(wanted)
    assert [path.name for path in run.iterdir() if not path.name.startswith("superseded-")] == []
    assert verify.leftovers(run) == []


# In full


@pytest.mark.slow
def test_six_trials_lose_nothing(tmp_path):
    from faults.campaign import Campaign

    campaign = Campaign(tmp_path)
    results = [campaign.run(trial) for trial in plan(6, 0, [1, 2])]
    assert sum(result.struck for result in results) >= 6
    assert [problem for result in results for problem in result.problems] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHER)
def test_two_ranks_under_the_launcher_lose_nothing(tmp_path, name):
    from faults.campaign import Campaign

    (trial,) = [t for t in plan(2 * len(KINDS), 0, [1, 2]) if t.launcher and t.kind.name == name]
    result = Campaign(tmp_path).run(trial)
    assert result.struck == 1 and result.problems == []
