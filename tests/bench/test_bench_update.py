"""`bench update`: a peer that does not fit leaves, one prompt a pass is the same loss, a wrong result stops numbers."""

import csv

import pytest
import torch

from bench import _harness, update
from bench._workload import REHEARSAL, Workload

pytest.importorskip("trl")


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(_harness, "RESULTS", tmp_path)
    monkeypatch.setattr(update, "memory_growth", lambda *_: 0.0)  # a process each
    return tmp_path


def metrics_of(folder):
    with (folder / "update.csv").open(newline="") as file:
        return {(row["peer"], row["metric"]) for row in csv.DictReader(file)}


def test_one_prompt_a_pass_is_the_same_loss_and_gradient(monkeypatch):
    """As a GPU's memory wants it of those that pad."""
    monkeypatch.setattr(Workload, "batches", lambda self: [self.padded([i]) for i in range(2)])
    work = Workload(REHEARSAL, "cpu")
    gold = update.outcome(update.Gold(work))
    assert all(gradient.dtype == torch.float64 for gradient in gold[1].values())
    for name in ("HuggingFace", "TRL", "Ours", "Checkpointed"):
        peer = getattr(update, name)(work)
        assert len(list(peer.losses())) == (1 if isinstance(peer, update.Ours) else 2)
        loss, gradient = update.distance(peer, gold)
        assert loss < 1e-6 and 0 < gradient < 1e-5


@pytest.mark.parametrize("call", [1, 2])
def test_a_peer_that_does_not_fit_is_a_row_that_says_so(call, results, monkeypatch):
    """Whether the check finds it out or the first update."""

    class Full(update.HuggingFace):
        calls = 0

        def losses(self):
            Full.calls += 1
            if Full.calls == call:
                raise torch.OutOfMemoryError("planted")
            yield from super().losses()

    monkeypatch.setattr(update, "CONTESTANTS", {"ours": update.Ours, "hf": Full})
    update.compare(REHEARSAL, "cpu", 1, torch.get_num_threads())
    assert Full.calls == call
    assert metrics_of(results) == {("ours", "ms"), ("ours", "growth_mb"), ("hf", "failed")}


def test_a_wrong_result_reports_nothing(results, monkeypatch):
    class Wrong(update.Ours):
        def losses(self):
            yield from (1.01 * loss for loss in super().losses())

    contestants = {"ours": Wrong, "hf": update.HuggingFace}
    monkeypatch.setattr(update, "CONTESTANTS", contestants)
    with pytest.raises(SystemExit, match="no numbers"):
        update.compare(REHEARSAL, "cpu", 1, torch.get_num_threads())
    assert not any(results.iterdir())
