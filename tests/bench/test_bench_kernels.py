"""`bench kernels`: a wrong result stops its numbers; without TRL plain PyTorch is still a peer."""

import csv
from types import SimpleNamespace

import pytest
import torch
from vtfast_kernels.cases import Shape

from bench import _harness, _sparse, kernels

SHAPE = Shape(64, 512, 32)


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(_harness, "RESULTS", tmp_path)
    monkeypatch.setattr(kernels, "growth", lambda *_: 1.0)  # a process each
    return tmp_path


def planted(monkeypatch, **others):
    whole = kernels.contestants

    def some(inputs, device):
        made = whole(inputs, device)
        made = {name: made[name] for name in ("ours", "plain")}
        return made | {name: plant(made["plain"]) for name, plant in others.items()}

    monkeypatch.setattr(kernels, "contestants", some)


def test_a_wrong_result_reports_nothing(results, monkeypatch):
    right = kernels.linear_grpo_loss

    def wrong(**inputs):
        return SimpleNamespace(loss=1.01 * right(**inputs).loss)

    planted(monkeypatch)
    monkeypatch.setattr(kernels, "linear_grpo_loss", wrong)
    with pytest.raises(SystemExit, match="no numbers"):
        kernels.compare(SHAPE, "cpu", 1, 1, torch.get_num_threads())
    assert not any(results.iterdir())


@pytest.mark.parametrize("is_there", [True, False])
def test_plain_pytorch_is_a_peer_with_trl_and_without(is_there, results, monkeypatch):
    if is_there:
        pytest.importorskip("trl")
    else:
        monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)

    def fails(_):
        def run():
            raise torch.OutOfMemoryError("planted")

        return run

    planted(monkeypatch, full=fails, wrong=lambda right: lambda: 1.01 * right())
    kernels.compare(SHAPE, "cpu", 1, 1, torch.get_num_threads())
    with (results / "kernels.csv").open(newline="") as file:
        found = {(row["peer"], row["metric"]) for row in csv.DictReader(file)}
    timed = {(name, metric) for name in ("ours", "plain") for metric in ("ms", "growth_mb")}
    assert found == timed | {("full", "failed"), ("wrong", "differs")}


def test_sparse_counts_flops_and_records_them(results, capsys):
    rows = _sparse.compare(Shape(64, 2048, 32), 0.4, "cpu", 1)
    timed, counted = rows
    assert timed["metric"] == "ms" and timed["ratio"] > 0 and counted["metric"] == "flops_share"
    line = capsys.readouterr().out.split()
    dense, kept = float(line[2]), float(line[3])
    assert 0 < dense < 1 and 0 < kept < 1
    assert counted["p50"] == pytest.approx((1 + 2 * (dense + (1 - dense) * kept)) / 3, abs=1e-3)
    _harness.append("kernels.csv", rows)
