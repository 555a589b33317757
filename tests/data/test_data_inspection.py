"""`vtfast data inspect`: what it says of a data set is what a run would find in it."""

import json
import tracemalloc

import pytest
from make_files import ROWS, encoded, picture, png_header, sat_row, write_jsonl, write_sat
from PIL import Image

from vtfast.cli.main import main
from vtfast.config import load_config
from vtfast.data import load_samples, shuffle_options
from vtfast.data.inspection import inspect_data, summary
from vtfast.data.processor import Processor
from vtfast.data.prompt_templates import load_template, render

MIXED = [
    sat_row(0),
    sat_row(1, image_bytes=[encoded(picture(112, 56)), encoded()], question_type="goal_aim"),
    sat_row(2, correct_answer="7"),
    sat_row(3, correct_answer="9"),
    sat_row(4, answers=["3", "4"]),
    sat_row(5, image_bytes=[png_header(50_000, 50_000)]),
    sat_row(6, answers=[]),
    sat_row(7, question="Is A left of B?"),
]


@pytest.fixture
def inspect(capsys):
    def inspected(*flags: object) -> dict:
        assert main(["data", "inspect", *map(str, flags), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return inspected


def test_counts_and_sizes(tmp_path, inspect):
    found = inspect(write_sat(tmp_path / "x.parquet", MIXED))
    assert (found["template"], found["model"]) == ("r1-zero", "tiny-spatial-base")
    assert (found["rows"], found["usable"]) == (8, 4)
    assert found["kinds"] == {"count": 2, "goal_aim": 1, "relation": 1}
    assert found["question_types"] == {"goal_aim": 1, "other": 3}
    assert found["options"] == {"2": 1, "5": 3}
    assert found["images"] == {"1": 3, "2": 1}
    assert found["image_width"] == {"min": 40, "median": 40, "p95": 112, "max": 112}
    assert found["image_height"] == {"min": 30, "median": 30, "p95": 56, "max": 56}
    assert found["left_out"] == []


def test_bad_rows_are_grouped_and_named(tmp_path, inspect):
    path = write_sat(tmp_path / "x.parquet", [*MIXED, *(sat_row(n, answers=[]) for n in range(4))])
    found = inspect(path)["bad"]
    assert [(group["count"], group["reason"]) for group in found] == [
        (5, "no options"),
        (2, "the answer … is not among the options …"),
        (1, "image …: image of more than … pixels"),
    ]
    assert found[0]["first"] == [f"{path}, row {n} (counted from 0): no options" for n in (6, 8, 9)]
    assert found[1]["first"][1].startswith(f"{path}, row 3 (counted from 0): the answer '9' is not among")


def test_what_a_selection_leaves_out(tmp_path, inspect):
    path = write_sat(tmp_path / "x.parquet", MIXED)
    found = inspect(path, "--static", "true")
    assert (found["rows"], found["usable"]) == (8, 3)
    assert [(group["count"], group["reason"]) for group in found["left_out"]] == [
        (1, "… images, --static takes rows with one")
    ]
    assert inspect(path, "--question_types", "goal_aim")["usable"] == 1
    assert inspect(path, "--limit", 2)["rows"] == 2


def test_prompt_lengths_are_those_of_the_run(tmp_path, inspect, base_path):
    path = write_sat(tmp_path / "x.parquet", MIXED)
    flags = ("--max_pixels", 3136, "--template", "instruct", "--literal_image", "true")
    found = inspect(path, *flags, "--model", base_path, "--seed", 3)
    processor = Processor.from_pretrained(base_path, 3136, 3136)
    prompts = [
        processor.encode(render(load_template("instruct"), sample, literal_image=True), sample.images)
        for sample in shuffle_options(load_samples(path), 3)
    ]
    lengths = sorted(len(prompt.ids) for prompt in prompts)
    assert found["prompt_tokens"]["min"] == lengths[0] and found["prompt_tokens"]["max"] == lengths[-1]
    assert found["prompt_tokens"]["median"] == sum(lengths[1:3]) / 2
    assert found["prompt"] == prompts[0].text
    assert inspect(path, *flags, "--max_prompt_length", lengths[-1])["usable"] == 4
    low = inspect(path, *flags, "--max_prompt_length", lengths[-1] - 1)
    assert low["usable"] == 3
    reasons = [group["reason"] for group in low["bad"]]
    assert "… tokens, above --max_prompt_length …" in reasons
    assert low["prompt_tokens"]["max"] == lengths[-1]  # it tells what would have to be allowed


def test_summary():
    assert summary([]) is None
    assert summary([7]) == {"min": 7, "median": 7, "p95": 7, "max": 7}
    assert summary(range(100, 0, -1)) == {"min": 1, "median": 50.5, "p95": 95, "max": 100}


def test_text_for_people(tmp_path, capsys):
    rows = [{"question": "1 + 1?", "answer": 2}, {"question": "?", "answer": ""}]
    path = write_jsonl(tmp_path / "mine.jsonl", rows)
    assert main(["data", "inspect", str(path), "--template", "r1-zero-text"]) == 0
    text = capsys.readouterr().out
    assert "rows            2, 1 of them usable\n" in text
    assert "options         open: 1\n" in text and "images          text only: 1\n" in text
    assert "image width" not in text  # there are none
    assert f"bad rows: 1 x the answer is empty\n  {path}, line 2: the answer is empty\n" in text
    assert text.endswith("User: 1 + 1?\nAssistant: <think>\n")


def test_columns_of_ones_own(tmp_path, inspect):
    path = write_jsonl(tmp_path / "mine.jsonl", [{"q": "?", "gold": "a"}])
    found = inspect(path, "--question_column", "q", "--answer_column", "gold")
    assert found["usable"] == 1


def test_a_data_set_without_a_usable_row_is_still_reported(tmp_path, inspect):
    found = inspect(write_sat(tmp_path / "x.parquet", MIXED[2:4]))
    assert (found["rows"], found["usable"], found["prompt_tokens"]) == (2, 0, None)
    assert inspect(write_sat(tmp_path / "y.parquet", []))["rows"] == 0


def test_a_recipe_says_how_to_read(tmp_path, inspect, base_path):
    path = write_sat(tmp_path / "x.parquet", ROWS)
    found = inspect(path, "--recipe", "visualthinker-2b-sat-instruct", "--model", base_path)
    assert found["template"] == "instruct"
    assert "<image>" in found["prompt"] and "<|im_start|>" in found["prompt"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "say what to do"),
        (["show"], "say what to do"),
        (["inspect"], "give a PATH"),
        (["inspect", "--recipe", "tiny-spatial"], "rendered by a run"),
        (["inspect", "gone.parquet"], "no such file or folder: gone.parquet"),
        (["inspect", "gone.parquet", "--limit", "0"], "--limit 0: must be at least 1"),
        (["inspect", "gone.parquet", "--limit", "x"], "--limit x: must be a whole number"),
        (["inspect", "gone.parquet", "--model", "../recipes"], "no model folder ../recipes"),
        (["inspect", "gone.parquet", "--templat", "brief"], "did you mean --template"),
        (["inspect", "nobody/no-such-set"], "nobody/no-such-set"),
        (["inspect", "gone.parquet", "--model", "nobody/no-such-model"], "nobody/no-such-model"),
    ],
)
def test_mistakes(flags, message, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["data", *flags]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_without_a_connection_it_tells_how_to_use_a_local_copy(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["data", "inspect", "array/SAT", "--limit", "5"]) == 2
    error = capsys.readouterr().err
    assert "array/SAT" in error and "hf download array/SAT --repo-type dataset" in error


def test_images_are_not_held(tmp_path):
    """Of 400 images no more than a batch or two of 64 are there at once."""
    image = encoded(Image.effect_noise((480, 480), 90).convert("RGB"), quality=95)
    path = write_sat(tmp_path / "x.parquet", [sat_row(image_bytes=[image])] * 400)
    config = load_config(overrides={"data": str(path), "template": "r1-zero"})
    tracemalloc.start()
    assert inspect_data(config).usable == 400
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 * len(image), f"{peak / len(image):.0f} images at once"
