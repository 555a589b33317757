"""From settings to questions: what a run asks of the data that it was given."""

import json

import pytest
from make_files import encoded, picture, sat_row, write_jsonl, write_sat

from vtfast.config import load_config
from vtfast.data import AUTO_COLUMNS, RowFilter
from vtfast.data.prompt_builder import PromptBuilder
from vtfast.data.skip_log import SkipLog
from vtfast.data.splits import columns, load_splits, row_filter
from vtfast.trainer import Trainer

TWO = {"image_bytes": [encoded(), encoded()], "question_type": "goal_aim"}


@pytest.fixture
def rows_asked(tmp_path, processor):
    """Row numbers by split that a run with these settings asks about."""

    def asked(**settings) -> dict[str, list[int]]:
        config = load_config(overrides={"eval_data": "none", **settings})
        samples = load_splits(config, PromptBuilder(config, processor), SkipLog(), tmp_path)
        return {split: [sample.row for sample in found] for split, found in samples.items()}

    return asked


def test_the_settings_select_rows(tmp_path, rows_asked):
    rows = [sat_row(0), sat_row(1, **TWO), sat_row(2, answers=[]), sat_row(3), sat_row(4)]
    data = str(write_sat(tmp_path / "x.parquet", rows))
    assert rows_asked(data=data) == {"train": [0, 1, 3, 4]}
    assert rows_asked(data=data, first_n=3) == {"train": [0, 1, 3]}
    assert rows_asked(data=data, first_rows=4) == {"train": [0, 1, 3]}
    assert rows_asked(data=data, first_rows=4, static="true") == {"train": [0, 3]}
    assert rows_asked(data=data, question_types="goal_aim") == {"train": [1]}
    assert rows_asked(data=data, question_types="goal_aim,other", first_n=2) == {"train": [0, 1]}
    held_out = rows_asked(data=data, first_rows=1, eval_data=data, static="true", eval_samples=2)
    assert held_out == {"train": [0], "val": [0, 3]}  # first_rows is the training data's alone


def test_rendered_data_need_no_columns(tmp_path, rows_asked):
    """--question_column and the like are about the user's own data, on either side of the run."""
    write_sat(tmp_path / "val.parquet", [sat_row(0)])
    data = write_jsonl(tmp_path / "mine.jsonl", [{"q": "How many?", "answer": "3"}])
    asked = rows_asked(data=str(data), question_column="q", eval_data="synthetic")
    assert asked == {"train": [0], "val": [0]}


def test_nothing_said():
    assert columns(load_config()) == AUTO_COLUMNS
    assert row_filter(load_config()) == RowFilter()
    assert row_filter(load_config(overrides={"question_types": "none"})).question_types is None


def test_a_run_on_rows_of_ones_own(tmp_path):
    """One image, two images and none, options and none: all are asked, answered, judged and trained on."""
    (tmp_path / "a.png").write_bytes(encoded(picture(60, 50), "PNG"))
    (tmp_path / "b.png").write_bytes(encoded(picture(80, 50), "PNG"))
    rows = [
        {"q": "How many?", "gold": 3, "img": "a.png"},
        {"q": "Same?", "gold": "yes", "pick": ["yes", "no"], "img": ["a.png", "b.png"]},
        {"q": "1 + 1?", "gold": "<answer> 2 </answer>"},
        {"q": "", "gold": "a"},
    ]
    data = write_jsonl(tmp_path / "mine.jsonl", rows)
    settings = {
        "data": str(data),
        "eval_data": "none",
        "output_dir": str(tmp_path / "run"),
        "template": "r1-zero",
        "question_column": "q",
        "answer_column": "gold",
        "options_column": "pick",
        "image_column": "img",
        "max_steps": 2,
        "per_device_train_batch_size": 3,
        "num_generations": 2,
        "max_completion_length": 4,
        "max_pixels": 12544,
        "device": "cpu",
    }
    run = Trainer(load_config(overrides=settings)).run()
    answered = [json.loads(line) for line in (run / "completions.jsonl").open()]
    assert {(row["step"], row["row"], row["answer"]) for row in answered} == {
        (step, row, answer) for step in (1, 2) for row, answer in enumerate(("3", "yes", "2"))
    }
    [skipped] = [json.loads(line) for line in (run / "skipped.jsonl").open()]
    assert (skipped["row"], skipped["reason"]) == (3, "the question is empty")
    assert skipped["where"] == "mine.jsonl, line 4"
