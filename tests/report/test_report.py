"""The report's contents: what is read from a run folder, what is counted, picked and tabulated."""

import json
import re

import pytest
from make_runs import completion_row, metrics_row, read, write_run

from vtfast.report.completions import LineSummary, evenly, pick, read_completions
from vtfast.report.read_run import read_runs
from vtfast.report.reflection import PATTERN, count_words, first_step, in_words
from vtfast.utils.errors import UserError

# ---- reading a run folder


def test_a_run_as_it_should_be(tmp_path):
    run = read(write_run(tmp_path / "one", [metrics_row(step) for step in (1, 2, 3)]))
    assert (run.name, run.status, run.notes) == ("one", "finished, 3 steps", [])
    assert [row["step"] for row in run.metrics] == [1, 2, 3]


NULLS = ("kl", "entropy", "loss", "grad_norm", "reward")


def test_torn_and_odd_lines_become_notes(tmp_path):
    folder = write_run(tmp_path / "run", max_steps=9)
    lines = [
        json.dumps(metrics_row(1, kl=None)),
        '{"step": 2, "kl": NaN, "entropy": -Infinity, "loss": "high", "grad_norm": true, "reward": 1%s}' % ("0" * 400),
        "not json",
        "[1, 2]",
        '{"loss": 1.0}',
        "",
        "\xff",
        '{"step": 3, "rew',
    ]
    (folder / "metrics.jsonl").write_bytes("\n".join(lines).encode("latin1"))
    run = read(folder)
    assert [row["step"] for row in run.metrics] == [1, 2]
    assert [run.metrics[1][key] for key in NULLS] == [None] * 5
    assert run.status == "step 2 of 9: still running, or stopped early"
    assert run.notes == ["metrics.jsonl: 5 unreadable line(s) left out."]


def test_a_run_that_went_back_counts_its_newer_steps(tmp_path):
    rows = [metrics_row(step, reward=float(i)) for i, step in enumerate([1, 2, 3, 2, 3, 4])]
    run = read(write_run(tmp_path / "run", rows))
    assert [(row["step"], row["reward"]) for row in run.metrics] == [(1, 0), (2, 3), (3, 4), (4, 5)]
    assert any("went back" in note for note in run.notes)


def test_missing_files_are_notes_and_an_empty_run_is_a_run(tmp_path):
    for config in ("{broken: [", "- a list", "day: 2025-13-45"):
        (tmp_path / "config.yaml").write_text(config)
        run = read(tmp_path)
        assert "config.yaml cannot be read." in run.notes
    assert run.metrics == [] and run.config == {} and run.evaluations == {}
    assert run.notes == ["metrics.jsonl is missing.", "config.yaml cannot be read."]
    assert read_completions(tmp_path).notes == ["completions.jsonl is missing."]
    run = read(write_run(tmp_path / "empty"))
    assert run.notes == ["metrics.jsonl holds no step yet."] and run.status.startswith("step 0 of 3")


def test_evaluations_come_in_order_of_steps_and_broken_ones_are_notes(tmp_path):
    score = {"vsr": {"total": 0.5, "count": 10}}
    folder = write_run(tmp_path / "run", evaluations={"step-10": score, "step-9": score, "mine": {}})
    (folder / "evaluations" / "mine" / "scores.json").write_text("{")
    run = read(folder)
    assert list(run.evaluations) == ["step-9", "step-10"]
    assert "evaluations/mine/scores.json cannot be read." in run.notes


def test_a_folder_that_is_no_run_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"neither config\.yaml nor metrics\.jsonl"):
        read(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        read(tmp_path / "gone")


def test_names_are_as_long_as_they_must_be(tmp_path):
    folders = [write_run(tmp_path / name) for name in ("a/run", "b/run", "other")]
    assert [run.name for run in read_runs(folders[1:])] == ["run", "other"]
    assert [run.name for run in read_runs(folders[:2])] == ["a/run", "b/run"]
    with pytest.raises(UserError, match="named twice"):
        read_runs([folders[0], folders[0]])


# ---- reflection words


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("Wait, let me re-examine it. WAIT!", {"wait": 2, "let me re-": 1}),
        ("Let me recheck and let me reconsider", {"let me re-": 2}),
        ("let me read this, let me remember", {}),
        ("a checkered waiter and his yeti, however-much", {"however": 1}),
        ("Aha! I checked; checking, check.", {"aha": 1, "check": 3}),
        ("possibly possible, impossible, possibility", {"possibl": 2}),
        ("verify verified verification", {"verify": 2}),
        ("not yet", {"yet": 1}),
        ("", {}),
    ],
)
def test_words_are_counted_whole(text, counts):
    assert count_words(text) == counts
    assert bool(re.search(PATTERN, text, re.IGNORECASE)) == bool(counts)


def test_the_first_step_that_reaches_the_threshold_is_dated():
    assert first_step({1: 0.0, 2: 0.0999, 3: 0.1, 4: 0.5}) == 3
    text = in_words({1: 0.0, 2: 0.0999, 3: 0.1, 4: 0.5})
    assert text.startswith("First seen at step 3: 10.0% ") and "step 1: 0.0%" in text
    assert "training did not bring it about" in in_words({1: 0.2, 2: 0.3})
    assert in_words({1: 0.0, 2: 0.05}).startswith("None seen") and "5.0% at step 2" in in_words({1: 0.0, 2: 0.05})
    assert "no word at all" in in_words({1: 0.0}) and "No completions" in in_words({})


# ---- completions


def test_few_completions_are_all_kept(tmp_path):
    rows = [completion_row(step, text) for step in (1, 2) for text in ("yes", "Wait, aha, wait")]
    found = read_completions(write_run(tmp_path / "run", completions=rows))
    assert found.total == 4 and [row["completion"] for row in found.shown] == ["yes", "Wait, aha, wait"] * 2
    assert found.shares == {1: 0.5, 2: 0.5}
    assert found.words[1] == {"wait": 2, "aha": 1}
    assert [row["reflects"] for row in found.shown] == [0, 3, 0, 3]


def test_completions_of_a_run_that_went_back(tmp_path):
    steps = [0, 0, 2, 2, 3, 2, 2, 3]
    rows = [completion_row(step, str(i)) for i, step in enumerate(steps)]
    found = read_completions(write_run(tmp_path / "run", completions=rows))
    assert [row["completion"] for row in found.shown] == ["0", "1", "5", "6", "7"]


def test_odd_completions(tmp_path):
    rows = [
        {"step": 1, "completion": "bare"},
        completion_row(1, 7),
        completion_row(None),
        completion_row(1, reward=float("nan"), rewards=["x"], question=None, length="many", answer=0),
        completion_row(1, "x" * 50_000),
    ]
    found = read_completions(write_run(tmp_path / "run", completions=rows))
    assert found.total == 3 and found.notes == ["completions.jsonl: 2 unreadable line(s) left out."]
    bare, odd, long = found.shown
    assert odd["answer"] == "0" and odd["kind"] == "count"
    assert bare["reward"] is None and bare["question"] == "" and bare["rewards"] == {}
    assert (odd["reward"], odd["rewards"], odd["question"], odd["length"]) == (None, {}, "", None)
    assert "[... 30,000 characters left out ...]" in long["completion"]
    assert len(long["completion"]) < 20_100


def test_what_is_picked_of_many():
    """50 steps of 20: the step that matters, the first and the last; of each the best, the worst, the reflecting."""
    rewards = {7: 2.0, 12: -2.0}
    seen = [
        LineSummary(100 * step + i, step, rewards.get(i, 0.0), {"wait": 1} if i in (4, 5) else {})
        for step in range(50)
        for i in range(20)
    ]
    picked = pick(seen, limit=80, keep=17)
    assert [row.offset for row in picked] == sorted({row.offset for row in picked})
    assert len(picked) == 11 * 8, "ten steps for the limit, and step 17"
    steps = {row.step for row in picked}
    assert {0, 17, 49} <= steps
    for step in steps:
        members = {row.offset % 100 for row in picked if row.step == step}
        assert {7, 12, 4, 5} <= members and len(members) == 8
    assert pick(seen[:80], limit=80) == seen[:80]
    assert {row.step for row in pick(seen, limit=3)} == {0, 49}


def test_evenly():
    assert evenly([1, 2, 3], 3) == [1, 2, 3] and evenly([], 2) == []
    assert evenly(range(11), 3) == [0, 5, 10]


def test_a_hundred_thousand_completions(tmp_path):
    line = json.dumps(completion_row(0, "a word and another " * 5))
    folder = write_run(tmp_path / "run")
    with (folder / "completions.jsonl").open("w") as file:
        for step in range(1, 1001):
            file.writelines(line.replace('"step": 0', f'"step": {step}') + "\n" for _ in range(100))
    found = read_completions(folder, characters=40_000)
    assert found.total == 100_000 and set(found.per_step.values()) == {100}
    assert 1900 <= len(found.shown) <= 2000
    assert {found.shown[0]["step"], found.shown[-1]["step"]} == {1, 1000}
    assert all(len(row["completion"]) < 80 for row in found.shown)
