"""What the benches share: one schema, what is listed, and a GPU day that says what it cannot run."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import __main__, _harness, gpu

RESULTS = Path(__file__).parent.parent / "bench" / "results"


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.csv")), ids=lambda path: path.name)
def test_kept_rows_have_the_one_schema(file):
    with file.open(newline="") as rows:
        header, *rest = csv.reader(rows)
    assert tuple(header) == _harness.COLUMNS
    assert rest and {len(row) for row in rest} == {len(header)}


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
    with pytest.raises(ValueError, match=r"old\.csv: its columns are op, peer"):
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
    assert {"aot", "gpu", "kernels", "profile", "rollout", "step", "update"} <= listed
    assert __main__.main(["kernel"]) == 2
    assert "kernels" in capsys.readouterr().err


STEPS = (
    gpu.Step("first", (), ("-c", "print('did', 'first')")),
    gpu.Step("second", (), ("-c", "raise SystemExit('broken')", gpu.OUT)),
    gpu.Step("third", (), ("-c", "print(1)"), needs=("no_such_package",)),
)


def test_a_gpu_day_names_what_failed_and_what_is_missing(tmp_path, monkeypatch, capsys):
    """A second call runs only what has not ended well. A bench that ends with 1 has missed a goal, no more."""
    monkeypatch.setattr(gpu, "STEPS", STEPS)
    arguments = ["--rehearse", "--out", str(tmp_path / "out")]
    assert gpu.main(arguments) == 0  # exit status 1 of a bench: its numbers stand
    done = json.loads((tmp_path / "out" / "steps.json").read_text())
    assert {name: entry["ended"] for name, entry in done.items()} == {
        "first": "well",
        "second": "well",
    }
    page = (tmp_path / "out" / "summary.md").read_text()
    assert "| third | needs no_such_package |" in page and "did first" in page

    crashes = gpu.Step("second", (), ("-c", "import sys; print('why'); sys.exit(3)"))
    monkeypatch.setattr(gpu, "STEPS", (STEPS[0], crashes))
    arguments = ["--rehearse", "--out", str(tmp_path / "other")]
    assert gpu.main(arguments) == 1
    said = capsys.readouterr().out
    assert "why" in said and "remaining: second" in said
    assert gpu.main(arguments) == 1
    assert "first" not in capsys.readouterr().out
