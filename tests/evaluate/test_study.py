"""The study in small, as a user goes through it: data in each published form, GRPO, SFT, evaluation, report."""

import json

import pytest
from make_benchmarks import write_all
from make_files import sat_row, write_sat, write_sat_v2, write_visualthinker

from vtfast.cli.main import main

FEW = [
    "--max_steps",
    "1",
    "--per_device_train_batch_size",
    "2",
    "--max_completion_length",
    "6",
    "--max_pixels",
    "12544",
    "--device",
    "cpu",
    "--cpu_threads",
    "1",
    "--eval_data",
    "none",
]


@pytest.fixture(params=["sat", "sat-v2", "visualthinker"])
def data(request, tmp_path) -> str:
    rows = [sat_row(seed) for seed in range(4)]
    if request.param == "sat":
        return str(write_sat(tmp_path / "SAT_train.parquet", rows))
    if request.param == "sat-v2":
        return str(write_sat_v2(tmp_path / "train-00000-of-00001.parquet", rows))
    return str(write_visualthinker(tmp_path / "SAT_train_15000.json", rows, tmp_path / "SAT_images_train"))


def test_from_data_to_the_report(data, tmp_path, capsys):
    assert main(["data", "inspect", data]) == 0
    assert "4, 4 of them usable" in capsys.readouterr().out
    grpo, sft = tmp_path / "grpo", tmp_path / "sft"
    recipe = ["--recipe", "visualthinker-2b-sat", "--model", "tiny-spatial-base", "--data", data, *FEW]
    assert main(["train", *recipe, "--num_generations", "2", "--output_dir", str(grpo)]) == 0
    recipe[1] = "visualthinker-2b-sft"
    assert main(["sft", *recipe, "--output_dir", str(sft)]) == 0

    benchmarks = write_all(tmp_path / "benchmarks")
    files = ",".join(f"{name}={path}" for name, path in benchmarks.items())
    for run in (grpo, sft):
        command = ["eval", "--model", str(run / "checkpoints" / "step-1"), "--bench", ",".join(benchmarks)]
        assert main([*command, "--data", files, "--max_completion_length", "6"]) == 0
        scores = json.loads((run / "evaluations" / "step-1" / "scores.json").read_text())
        assert scores.keys() == benchmarks.keys()
        assert all(0 <= score["total"] <= 1 and score["count"] for score in scores.values())
        assert {score["max_pixels"] for score in scores.values()} == {12544}, "as in training"
    assert main(["report", str(grpo), str(sft)]) == 0
    page = (grpo / "report.html").read_text()
    assert "CV-Bench" in page and "visualthinker-2b-sft" in page
