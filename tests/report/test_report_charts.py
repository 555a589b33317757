"""Charts and tables of the report: what they show of one run and of several."""

import pytest
from make_runs import completion_row, metrics_row, read, write_run

from vtfast.evaluate import published_scores
from vtfast.report import charts, tables
from vtfast.report.completions import read_completions
from vtfast.report.read_run import read_runs, save_held_out


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
    rows = [metrics_row(1), metrics_row(2, **{"time/score": None}), metrics_row(3, **{"time/step": 3})]
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


CVBENCH_ROWS = {"Count": 788, "Relation": 650, "Depth": 600, "Distance": 600}


def by_task(row, columns):
    """Of a published row: (micro average of CV-Bench's tasks, the total printed)."""
    cells = {task: value for value, (_, bench, task) in zip(row, columns, strict=True) if bench == "cvbench"}
    total = sum(CVBENCH_ROWS[task] * cells[task] for task in CVBENCH_ROWS) / 2638
    return total, cells[None]


@pytest.mark.parametrize(
    ("row", "columns"),
    [(row, published_scores.TABLE_3_COLUMNS) for row in published_scores.TABLE_3.values()]
    + [(row, published_scores.TABLE_5_COLUMNS) for row in published_scores.TABLE_5.values()],
)
def test_the_papers_totals_follow_from_its_tasks(row, columns):
    computed, printed = by_task(row, columns)
    assert computed == pytest.approx(printed, abs=0.011)


def test_table_3_places_each_score_under_its_heading(tmp_path):
    first = {"cvbench": {"total": 0.3138, "by_task": {"Count": 0.5469, "Depth": 0.1016}, "count": 2638}}
    last = {
        "cvbench": {"total": 0.5, "by_task": {"Relation": 0.25, "Distance": float("nan")}, "count": 2638},
        "blink": {"total": 0.1, "by_task": {"Relative Depth": 0.2, "Spatial_Relation": 0.3}, "count": 40},
        "vsr": {"total": None, "by_task": "none"},
    }
    folder = write_run(tmp_path / "run", evaluations={"step-0": first, "step-30": last, "a": first})
    table = tables.table_3([read(folder)])
    assert [row["label"] for row in table["rows"] if row.get("paper")] == list(published_scores.TABLE_3)
    assert table["rows"][0]["cells"][2] == "10.16"
    before, after = table["rows"][3:]
    assert before["cells"] == ["54.69", "", "10.16", "", "31.38", "", "", "", ""]
    assert after["cells"] == ["", "25.00", "", "", "50.00", "20.00", "30.00", "10.00", ""]
    assert (before["note"], after["note"]) == ("step 0", "step 30; 40 of 267 BLINK questions")
    other = write_run(tmp_path / "other")
    rows = tables.table_3(read_runs([folder, other]))["rows"][3:]
    assert [(row["label"], row["note"][:7]) for row in rows] == [("run", "step 30"), ("other", "not eva")]
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
        metrics_row(step, reward=0.0 if step <= 2 else 1.5, kl=None, **{"time/step": 10.5}) for step in range(1, 13)
    ]
    runs = [read(write_run(tmp_path / name, rows)) for name in ("short", "long")]
    runs[1].metrics[0]["time/step"] = 7200.0
    table = tables.overview(runs)
    short, long = (dict(zip(table["columns"], row["cells"], strict=True)) for row in table["rows"])
    assert short["reward"] == "1.50" and short["KL"] == ""
    assert (short["time trained"], long["time trained"]) == ("2 min 6 s", "2 h 1 min")


def test_held_out_scores_survive_the_way_through_the_file(tmp_path):
    from vtfast.evaluate.held_out import HeldOutScores

    before = HeldOutScores({"sampled": {"all": (0.28, 0.45)}, "greedy": {"all": (0.56, 0.98)}}, 400)
    after = HeldOutScores({"sampled": {"all": (0.99, 1.0)}, "greedy": {"all": (1.0, 1.0)}}, 400)
    folder = write_run(tmp_path / "run")
    save_held_out(folder, before, None)
    save_held_out(folder, None, after)
    assert read(folder).held_out is None
    save_held_out(folder, before, after)
    (table,) = tables.held_out([read(folder)])
    assert table["columns"] == ["accuracy, sampled", "accuracy, greedy", "format, sampled", "format, greedy"]
    assert table["rows"] == [{"label": "all", "cells": ["0.28 → 0.99", "0.56 → 1.00", "0.45 → 1.00", "0.98 → 1.00"]}]
    (folder / "held_out.json").write_text('{"before": {"count": 1}}')
    run = read(folder)
    assert run.held_out is None and "held_out.json cannot be read." in run.notes
