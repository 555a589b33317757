"""What the benches share: one schema, what is listed, and a GPU day that says what it cannot run."""

import csv
import importlib
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import __main__, _harness, gpu

RESULTS = Path(__file__).parents[2] / "bench" / "results"


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.csv")), ids=lambda path: path.name)
def test_kept_rows_have_the_one_schema(file):
    with file.open(newline="") as rows:
        header, *rest = csv.reader(rows)
    assert tuple(header) == _harness.COLUMNS
    assert rest and {len(row) for row in rest} == {len(header)}


@pytest.mark.parametrize("name", ["kernels", "rollout", "update", "step"])
def test_the_tests_that_come_first_are_there(name):
    tests = importlib.import_module(f"bench.{name}").TESTS
    assert tests and all((_harness.ROOT / "tests" / file).is_file() for file in tests)
    assert (_harness.ROOT / gpu.GRAPHS).is_file()


def test_rows_are_appended_and_another_schema_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(_harness, "RESULTS", tmp_path)
    monkeypatch.setattr(_harness, "_clocks", [1700, 1980, 1900])
    _harness.append("a.csv", [{"op": "x", "p50": 1.23456}])
    _harness.append("a.csv", [{"op": "y"}])
    with (tmp_path / "a.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["op"], first["p50"], first["clocks"]) == ("x", "1.235", "1900")
    assert second["clocks"] == ""  # of other runs
    with pytest.raises(ValueError, match="speed"):
        _harness.append("a.csv", [{"speed": 1}])
    (tmp_path / "old.csv").write_text("op,peer\n")
    with pytest.raises(ValueError, match=r"old\.csv: has the columns op, peer"):
        _harness.append("old.csv", [{"op": "x"}])


def test_the_clock_of_the_current_device(monkeypatch):
    """By its UUID: the driver's numbering is not PyTorch's. None where the driver does not say."""
    asked = []

    class Driver:
        fails = 0

        def nvmlDeviceGetHandleByUUID(self, uuid, handle):
            asked.append(uuid)
            return 0

        def nvmlDeviceGetClockInfo(self, handle, kind, clock):
            clock._obj.value = 1980 if kind == 1 else 2619
            return self.fails

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="ab-1"))
    monkeypatch.setattr(_harness, "_nvml", Driver)
    assert _harness.sm_clock() == 1980 and asked == [b"GPU-ab-1"]
    Driver.fails = 3
    assert _harness.sm_clock() is None
    monkeypatch.setattr(_harness, "_nvml", lambda: None)
    assert _harness.sm_clock() is None


def test_rounds_alternate_and_a_slow_run_leaves_early():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    times = _harness.alternate(runs, 3, "cpu", limits={"c": 1})
    assert "".join(order) == "abc" + "ba" + "ab"
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 1}


def test_without_a_name_the_benches_are_listed(capsys):
    assert __main__.main([]) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]}
    assert {"aot", "first_steps", "gpu", "kernels", "profile", "rollout", "step", "update"} <= listed
    assert __main__.main(["kernel"]) == 2
    assert "kernels" in capsys.readouterr().err


STEPS = (
    gpu.Step("first", (), ("-c", "print('did', 'first')")),
    gpu.Step("second", (), ("-c", "raise SystemExit(3)", gpu.OUT)),
    gpu.Step("third", (), ("-c", "print(1)"), needs=("no_such_package",)),
)


def test_a_gpu_day_names_what_failed_and_what_is_missing(tmp_path, monkeypatch, capsys):
    """A second call runs only what has not ended well."""
    monkeypatch.setattr(gpu, "STEPS", STEPS)
    arguments = ["--rehearse", "--out", str(tmp_path / "out")]
    assert gpu.main(arguments) == 0  # exit status 3 of a bench: a goal was missed, its numbers stand
    done = json.loads((tmp_path / "out" / "steps.json").read_text())
    assert {name: entry["ended"] for name, entry in done.items()} == {"first": "well", "second": "well"}
    page = (tmp_path / "out" / "summary.md").read_text()
    assert "| third | needs no_such_package |" in page and "did first" in page
    with tarfile.open(tmp_path / "out.tar.gz") as everything:
        assert {"out/summary.md", "out/first.log", "out/steps.json"} <= set(everything.getnames())

    crashes = gpu.Step("second", (), ("-c", "raise ValueError('why')"))
    monkeypatch.setattr(gpu, "STEPS", (STEPS[0], crashes))
    arguments = ["--rehearse", "--out", str(tmp_path / "other")]
    assert gpu.main(arguments) == 1
    said = capsys.readouterr().out
    assert "why" in said and "remaining: second" in said
    assert gpu.main(arguments) == 1
    assert "first" not in capsys.readouterr().out


def test_after_a_red_test_nothing_is_measured(tmp_path, monkeypatch, capsys):
    red = gpu.Step("tests", (), ("-c", "raise SystemExit(1)"))
    monkeypatch.setattr(gpu, "STEPS", (red, STEPS[0]))
    arguments = ["--rehearse", "--out", str(tmp_path)]
    assert gpu.main(arguments) == 1
    assert "nothing is measured" in capsys.readouterr().out
    assert not (tmp_path / "first.log").exists()
    assert "no number below may be quoted" in (tmp_path / "summary.md").read_text()
    assert gpu.main([*arguments, "--anyway"]) == 1
    assert (tmp_path / "first.log").read_text() == "did first\n"


def test_tests_that_take_long_leave_time_for_the_others(tmp_path, monkeypatch):
    given = {}

    def run(step, out, seconds, env, rehearse):
        given[step.name] = seconds
        (out / f"{step.name}.log").write_text("")
        return {"name": step.name, "seconds": seconds, "ended": "stopped"}

    names = "tests", "kernels", "rollout"
    monkeypatch.setattr(gpu, "STEPS", tuple(gpu.Step(name, (), ()) for name in names))
    monkeypatch.setattr(gpu, "run", run)
    assert gpu.main(["--rehearse", "--minutes", "1", "--out", str(tmp_path)]) == 1
    assert given["tests"] <= 30 < given["kernels"] <= 60


def test_what_was_never_tried_comes_before_what_was_stopped(monkeypatch):
    names = "tests", "kernels", "rollout", "update"
    monkeypatch.setattr(gpu, "STEPS", tuple(gpu.Step(name, (), ()) for name in names))
    done = {"tests": "stopped", "kernels": "stopped", "rollout": "well"}
    left = gpu.pending({name: {"ended": ended} for name, ended in done.items()})
    assert [step.name for step in left] == ["tests", "update", "kernels"]


def test_a_stopped_step_takes_its_children_with_it(tmp_path):
    child = "import time; time.sleep(60)"
    starts = f"p = subprocess.Popen([sys.executable, '-c', {child!r}])"
    parent = f"import subprocess, sys; {starts}; print(p.pid, flush=True); p.wait()"
    step = gpu.Step("x", (), ("-c", parent))
    assert gpu.run(step, tmp_path, 5, dict(os.environ), True)["ended"] == "stopped"
    pid = int((tmp_path / "x.log").read_text())
    status = Path(f"/proc/{pid}/status")
    waits = time.monotonic() + 30
    while status.exists() and "zombie" not in status.read_text():
        assert time.monotonic() < waits, "the child lives on"
        time.sleep(0.1)


def test_one_gpu_is_shown_and_none_to_a_rehearsal(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    shown = {}
    for rehearse in (False, True):
        links = tmp_path / str(rehearse)
        links.mkdir()
        shown[rehearse] = gpu.environment(links, tmp_path, rehearse)["CUDA_VISIBLE_DEVICES"]
    assert shown == {False: "3", True: ""}


def test_quantiles_are_as_far_from_the_middle_on_both_sides():
    assert _harness.quantiles([5.0, 1.0, 4.0, 2.0, 3.0]) == pytest.approx((1.8, 3.0, 4.2))
    assert _harness.quantiles([2.0]) == (2.0, 2.0, 2.0)


def test_an_export_and_a_machine_without_git_have_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(_harness, "ROOT", tmp_path)
    assert _harness.commit() == "unknown"
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _harness.commit() == "unknown"


@pytest.mark.parametrize("bench", ["kernels", "rollout", "update"])
def test_a_bench_of_kernels_asks_for_torch_and_transformers_alone(bench):
    """Nor for what only some runs need: a borrowed machine may lack it."""
    absent = "psutil", "deepspeed", "datasets", "trl", "matplotlib"
    code = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); import bench.{bench}"
    done = subprocess.run([sys.executable, "-c", code], cwd=_harness.ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
