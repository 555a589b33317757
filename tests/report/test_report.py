"""The report's contents: what is read from a run folder, what is counted, picked and tabulated."""

import json
import re
from pathlib import Path

import pytest
from make_runs import completion_row, metrics_row, write_run

from vtfast import paper
from vtfast.errors import UserError
from vtfast.report import charts, tables
from vtfast.report.completions import Seen, evenly, pick, read_completions
from vtfast.report.reflection import PATTERN, count_words, first_step, in_words
from vtfast.report.run_folder import read_runs, save_held_out


def read(folder: Path):
    return read_runs([folder])[0]


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
        '{"step": 2, "kl": NaN, "entropy": -Infinity, "loss": "high", "grad_norm": true, "reward": 1%s}'
        % ("0" * 400),
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
    assert run.status == "step 2 of 9: still going, or stopped early"
    assert run.notes == [
        "metrics.jsonl: 3 unreadable line(s) left out.",
        "metrics.jsonl: the last line is cut off and left out.",
        "metrics.jsonl: 1 line(s) without a step left out.",
    ]


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
    assert run.notes == ["metrics.jsonl holds no step yet."] and run.status.startswith(
        "step 0 of 3"
    )


def test_evaluations_come_in_order_of_steps_and_broken_ones_are_notes(tmp_path):
    score = {"vsr": {"total": 0.5, "count": 10}}
    folder = write_run(
        tmp_path / "run", evaluations={"step-10": score, "step-9": score, "mine": {}}
    )
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
    assert in_words({1: 0.0, 2: 0.05}).startswith("None seen") and "5.0% at step 2" in in_words(
        {1: 0.0, 2: 0.05}
    )
    assert "no word at all" in in_words({1: 0.0}) and "No completions" in in_words({})


# ---- completions


def test_few_completions_are_all_kept(tmp_path):
    rows = [completion_row(step, text) for step in (1, 2) for text in ("yes", "Wait, aha, wait")]
    found = read_completions(write_run(tmp_path / "run", completions=rows))
    assert (
        found.total == 4
        and [row["completion"] for row in found.shown]
        == [
            "yes",
            "Wait, aha, wait",
        ]
        * 2
    )
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
        completion_row(
            1, reward=float("nan"), rewards=["x"], question=None, length="many", answer=0
        ),
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
        Seen(100 * step + i, step, rewards.get(i, 0.0), {"wait": 1} if i in (4, 5) else {})
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
    assert evenly(range(11), 3) == [0, 5, 10] and evenly(range(11), 1) == [0]
    assert evenly(range(11), 0) == []


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


# ---- charts


def titles(found: list) -> list[str]:
    return [chart["title"] for chart in found]


def test_one_run_shows_several_quantities_a_chart_and_leaves_out_what_was_not_logged(tmp_path):
    rows = [metrics_row(1), metrics_row(2, kl=None), metrics_row(3)]
    run = read(write_run(tmp_path / "run", rows))
    found = {chart["title"]: chart for chart in charts.training_charts([run])}
    kl = found["KL divergence from the starting model"]["lines"]
    assert [(line["x"], line["y"]) for line in kl] == [([1, 2, 3], [0.01, None, 0.03])]
    assert "Token accuracy" not in found and "Loss" not in found
    assert charts.is_zero(found["Clipped tokens"]) and not charts.is_zero(found["Entropy"])
    rows = [metrics_row(1, **{"rewards/failed": 2.0})]
    run = read(write_run(tmp_path / "failing", rows))
    assert "Rewards that failed" in titles(charts.training_charts([run]))
    (reward,) = charts.reward_charts([run])
    assert [line["label"] for line in reward["lines"]] == ["total", "accuracy", "format"]


def test_several_runs_show_one_quantity_a_chart_and_keep_their_colours(tmp_path):
    runs = read_runs(
        [
            write_run(tmp_path / "a", [metrics_row(1)]),
            write_run(tmp_path / "b"),
            write_run(tmp_path / "c", [metrics_row(1)]),
        ]
    )
    found = charts.reward_charts(runs)
    assert titles(found) == ["Reward: total", "Reward: accuracy", "Reward: format"]
    assert [(line["label"], line["colour"]) for line in found[0]["lines"]] == [("a", 0), ("c", 2)]


def test_the_phases_of_a_step_and_what_is_left(tmp_path):
    rows = [
        metrics_row(1),
        metrics_row(2, **{"time/score": None}),
        metrics_row(3, **{"time/step": 3}),
    ]
    run = read(write_run(tmp_path / "run", rows))
    phases = charts.time_charts([run])[0]
    assert phases["stacked"] and phases["unit"] == "seconds"
    assert {line["label"]: line["y"] for line in phases["lines"]} == {
        "rollout": [2, 2, 2],
        "score": [0.5, 0, 0.5],
        "update": [1, 1, 1],
        "other": [0.5, 1, 0],
    }


def test_long_runs_are_averaged_and_say_so(tmp_path):
    rows = [metrics_row(step, entropy=step % 2, kl=None) for step in range(1, 9001)]
    run = read(write_run(tmp_path / "run", rows))
    found = {chart["title"]: chart for chart in charts.training_charts([run])}
    (line,) = found["Entropy"]["lines"]
    assert found["Entropy"]["note"] == "means over 3 steps"
    assert line["x"][:3] == [1, 4, 7] and line["y"][:2] == [0.66667, 0.33333]
    phases = charts.time_charts([run])[0]
    assert phases["note"] == "means over 60 steps" and len(phases["lines"][0]["x"]) == 150
    assert len(line["x"]) == 3000 and "KL divergence from the starting model" not in found


def test_accuracy_over_steps_with_the_papers_result(tmp_path):
    def scores(total):
        return {"cvbench": {"total": total}, "sat": {"total": 0.5}}

    evaluations = {"step-100": scores(0.6), "step-20": scores(0.4), "other": scores(0.9)}
    one = read(write_run(tmp_path / "one", evaluations=evaluations))
    (chart,) = charts.accuracy_charts([one])
    bench, sat = chart["lines"]
    assert (bench["label"], bench["x"], bench["y"]) == ("CV-Bench", [20, 100], [0.4, 0.6])
    assert (bench["colour"], sat["colour"], sat["label"]) == (0, 1, "SAT")
    assert [mark["y"] for mark in chart["marks"]] == [0.5947]
    two = read(write_run(tmp_path / "two", evaluations={"step-20": {"cvbench": {"total": 0.3}}}))
    found = charts.accuracy_charts([one, two])
    assert titles(found) == ["CV-Bench accuracy", "SAT accuracy"]
    assert [len(chart["lines"]) for chart in found] == [2, 1]


def test_reflection_over_steps(tmp_path):
    rows = [completion_row(1, "so"), completion_row(1, "wait, wait"), completion_row(2, "so")]
    folder = write_run(tmp_path / "run", completions=rows)
    share, words = charts.reflection_charts([read(folder)], [read_completions(folder)])
    assert share["lines"][0]["y"] == [0.5, 0.0] and share["marks"][0]["y"] == 0.1
    assert [(line["label"], line["y"]) for line in words["lines"]] == [("wait", [100.0, 0.0])]


# ---- tables

CVBENCH_ROWS = {"Count": 788, "Relation": 650, "Depth": 600, "Distance": 600}


def by_task(row, columns):
    """Of a published row: (micro average of CV-Bench's tasks, the total printed)."""
    cells = {
        task: value
        for value, (_, bench, task) in zip(row, columns, strict=True)
        if bench == "cvbench"
    }
    total = sum(CVBENCH_ROWS[task] * cells[task] for task in CVBENCH_ROWS) / 2638
    return total, cells[None]


@pytest.mark.parametrize(
    ("row", "columns"),
    [(row, paper.TABLE_3_COLUMNS) for row in paper.TABLE_3.values()]
    + [(row, paper.TABLE_5_COLUMNS) for row in paper.TABLE_5.values()],
)
def test_the_papers_totals_follow_from_its_tasks(row, columns):
    computed, printed = by_task(row, columns)
    assert computed == pytest.approx(printed, abs=0.011)


def test_table_3_places_each_score_under_its_heading(tmp_path):
    first = {
        "cvbench": {"total": 0.3138, "by_task": {"Count": 0.5469, "Depth": 0.1016}, "count": 2638}
    }
    last = {
        "cvbench": {
            "total": 0.5,
            "by_task": {"Relation": 0.25, "Distance": float("nan")},
            "count": 2638,
        },
        "blink": {
            "total": 0.1,
            "by_task": {"Relative Depth": 0.2, "Spatial_Relation": 0.3},
            "count": 40,
        },
        "vsr": {"total": None, "by_task": "none"},
    }
    folder = write_run(tmp_path / "run", evaluations={"step-0": first, "step-30": last, "a": first})
    table = tables.table_3([read(folder)])
    assert [row["label"] for row in table["rows"] if row.get("paper")] == list(paper.TABLE_3)
    assert table["rows"][0]["cells"][2] == "10.16"
    before, after = table["rows"][3:]
    assert before["cells"] == ["54.69", "", "10.16", "", "31.38", "", "", "", ""]
    assert after["cells"] == ["", "25.00", "", "", "50.00", "20.00", "30.00", "10.00", ""]
    assert (before["note"], after["note"]) == ("step 0", "step 30; 40 of 267 BLINK questions")
    other = write_run(tmp_path / "other")
    rows = tables.table_3(read_runs([folder, other]))["rows"][3:]
    assert [(row["label"], row["note"][:7]) for row in rows] == [
        ("run", "step 30"),
        ("other", "not eva"),
    ]
    assert all(len(row["cells"]) == len(table["columns"]) for row in [*table["rows"], *rows])


def test_table_5_names_what_was_frozen(tmp_path):
    scores = {"cvbench": {"total": 0.5, "by_task": {"Distance": 0.25}, "count": 2638}}
    runs = read_runs(
        [
            write_run(tmp_path / "a", evaluations={"step-5": scores}, freeze=["vision"]),
            write_run(tmp_path / "b", freeze=[]),
            write_run(tmp_path / "c", freeze=["language", "merger"]),
        ]
    )
    rows = tables.table_5(runs)["rows"]
    assert [row["label"] for row in rows[3:]] == [
        "vision encoder frozen: a",
        "nothing frozen: b",
        "language model and merger frozen: c",
    ]
    assert rows[3]["cells"] == ["50.00", "", "", "", "25.00"] and rows[4]["cells"] == [""] * 5
    assert rows[1]["cells"][0] == "68.34"


def test_only_the_settings_that_differ(tmp_path):
    runs = read_runs(
        [
            write_run(tmp_path / "a", freeze=[], beta=0.0, output_dir="a", use_peft=True),
            write_run(tmp_path / "b", freeze=["vision"], beta=0.0, output_dir="b"),
        ]
    )
    rows = tables.differing_settings(runs)["rows"]
    assert [(row["label"], row["cells"]) for row in rows] == [
        ("freeze", ["none", "vision"]),
        ("use_peft", ["true", ""]),
    ]


def test_the_overview_is_of_the_last_steps(tmp_path):
    rows = [
        metrics_row(step, reward=0.0 if step <= 2 else 1.5, kl=None, **{"time/step": 10.5})
        for step in range(1, 13)
    ]
    runs = [read(write_run(tmp_path / name, rows)) for name in ("short", "long")]
    runs[1].metrics[0]["time/step"] = 7200.0
    table = tables.overview(runs)
    short, long = (dict(zip(table["columns"], row["cells"], strict=True)) for row in table["rows"])
    assert short["reward"] == "1.50" and short["KL"] == ""
    assert (short["time trained"], long["time trained"]) == ("2 min 6 s", "2 h 1 min")


def test_held_out_scores_survive_the_way_through_the_file(tmp_path):
    from vtfast.evaluate.held_out import HeldOut

    before = HeldOut({"sampled": {"all": (0.28, 0.45)}, "greedy": {"all": (0.56, 0.98)}}, 400)
    after = HeldOut({"sampled": {"all": (0.99, 1.0)}, "greedy": {"all": (1.0, 1.0)}}, 400)
    folder = write_run(tmp_path / "run")
    save_held_out(folder, before, None)
    save_held_out(folder, None, after)
    assert read(folder).held_out is None
    save_held_out(folder, before, after)
    (table,) = tables.held_out([read(folder)])
    assert table["columns"] == [
        "accuracy, sampled",
        "accuracy, greedy",
        "format, sampled",
        "format, greedy",
    ]
    assert table["rows"] == [
        {"label": "all", "cells": ["0.28 → 0.99", "0.56 → 1.00", "0.45 → 1.00", "0.98 → 1.00"]}
    ]
    (folder / "held_out.json").write_text('{"before": {"count": 1}}')
    run = read(folder)
    assert run.held_out is None and "held_out.json cannot be read." in run.notes
