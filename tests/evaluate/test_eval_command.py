"""`vtfast eval`: which model and template it takes, what it leaves, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from make_benchmarks import COUNTS, flags, rows_of

from vtfast.cli.main import main
from vtfast.evaluate import BENCHMARKS, run_benchmark
from vtfast.evaluate.resolve_model import default_template, find_model
from vtfast.utils.errors import UserError


def test_what_a_model_stands_for(run_folder, base_path, monkeypatch, tmp_path):
    step = run_folder / "checkpoints" / "step-100"
    shutil.copytree(base_path, run_folder / "checkpoints" / "step-20")
    (run_folder / "checkpoints" / "step-200").mkdir()  # torn: no model in it
    (run_folder / "checkpoints" / ".step-300.partial").mkdir()
    for name in (step, run_folder / "checkpoints" / "last", run_folder):
        found = find_model(str(name))
        assert (found.path, found.name, found.output_root, found.step) == (str(step), "step-100", run_folder, 100)
        assert found.config["max_pixels"] == 784
    (run_folder / "checkpoints" / "last").symlink_to("step-20")
    assert find_model(str(run_folder)).step == 20
    gone = find_model(str(run_folder / "checkpoints" / "step-7"))
    assert (gone.step, gone.output_root) == (7, run_folder)

    monkeypatch.chdir(tmp_path)
    elsewhere = shutil.copytree(base_path, tmp_path / "step-5")
    assert (find_model("step-5").name, find_model("step-5").step) == ("step-5", None)
    assert find_model(str(elsewhere)).output_root == Path()
    hub = find_model("Qwen/Qwen2-VL-2B")
    assert (hub.path, hub.name, hub.step) == ("Qwen/Qwen2-VL-2B", "Qwen2-VL-2B", None)
    assert find_model("tiny-spatial-base").path == str(base_path)
    empty = tmp_path / "empty"
    (empty / "checkpoints").mkdir(parents=True)
    (empty / "config.yaml").write_text("template: r1-zero")
    with pytest.raises(UserError, match=r"there is no checkpoint \(step-N\) in"):
        find_model(str(empty))


@pytest.mark.parametrize(
    ("trained_with", "chat", "template"),
    [
        ("r1-zero", "<|im_start|>", "eval-r1-zero"),
        ("brief", None, "eval-r1-zero"),
        ("instruct", None, "eval-instruct"),
        ("eval-r1-zero-direct", None, "eval-r1-zero-direct"),
        ("eval-instruct-direct", None, "eval-instruct-direct"),
        (None, "…<|im_start|>…", "eval-instruct"),
        (None, "{{ messages }}", "eval-r1-zero"),
        (None, {"default": "{{ messages }}", "instruct": "<|im_start|>"}, "eval-r1-zero"),
        (None, None, "eval-r1-zero"),
    ],
)
def test_the_default_template(trained_with, chat, template, run_folder):
    (run_folder / "config.yaml").write_text(yaml.safe_dump({"template": trained_with, "model": "x"}))
    assert default_template(find_model(str(run_folder)), chat) == template


@pytest.fixture(scope="module")
def evaluated(files, tmp_path_factory, base_path):
    """`vtfast eval` of a run's checkpoint on all benchmarks -> (run folder, what it printed)."""
    run = tmp_path_factory.mktemp("run")
    shutil.copytree(base_path, run / "checkpoints" / "step-100")
    (run / "config.yaml").write_text(
        yaml.safe_dump({"template": "r1-zero", "literal_image": True, "min_pixels": 784, "max_pixels": 784})
    )
    command = ["eval", "--model", str(run / "checkpoints" / "last"), *flags(files), "--batch_size", "3"]
    assert main(command) == 0
    return run, command


def test_every_benchmark_through_the_command(evaluated, files, capsys):
    run, _ = evaluated
    folder = run / "evaluations" / "step-100"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*(f"{bench}.jsonl" for bench in files), "scores.json", "settings.json"]
    )
    scores = json.loads((folder / "scores.json").read_text())
    assert set(COUNTS) == set(BENCHMARKS)
    for bench, count in COUNTS.items():
        rows, result = rows_of(folder / f"{bench}.jsonl"), scores[bench]
        assert [row["index"] for row in rows] == list(range(count))
        assert list(rows[0]) == [
            *(
                "index",
                "task",
                "source",
                "question",
                "options",
                "gold",
                "images",
                "response",
                "correct",
                "strict_correct",
            ),
            *("tokens", "finish_reason"),
        ]
        assert result["count"] == count and result["step"] == 100 and result["max_pixels"] == 784
        assert result["template"] == "eval-r1-zero" and result["model"].endswith("checkpoints/last")
        assert result["total"] == sum(row["correct"] for row in rows) / count
        assert result["strict"]["total"] == sum(row["strict_correct"] for row in rows) / count
        assert all(0 < row["tokens"] <= 12 for row in rows) and result["truncated"] <= 1
        assert set(result["by_task"]) == {row["task"] for row in rows}
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["vsr"]["literal_image"] is True and settings["vsr"]["max_pixels"] == 784


def test_rescoring_needs_neither_model_nor_data(evaluated, tmp_path, capsys):
    run, _ = evaluated
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "step-100")
    (copy / "checkpoints" / "step-100").mkdir()
    scores = copy / "evaluations" / "step-100" / "scores.json"
    before = json.loads(scores.read_text())
    scores.unlink()
    model = str(copy / "checkpoints" / "step-100")
    assert main(["eval", "--model", model, "--rescore"]) == 0
    table = capsys.readouterr().out
    after = json.loads(scores.read_text())
    for bench, result in before.items():
        assert after[bench] == result | {"model": model}
    assert all(benchmark.title in table for benchmark in BENCHMARKS.values()) and "59.47" in table
    (copy / "evaluations" / "step-100" / "blink.jsonl").unlink()
    assert main(["eval", "--model", model, "--rescore", "--bench", "vsr,blink"]) == 2
    assert "there is no blink.jsonl in" in capsys.readouterr().err


def test_a_second_call_asks_nothing(evaluated, capsys, caplog, monkeypatch):
    run, command = evaluated
    monkeypatch.setattr(run_benchmark.BenchmarkRunner, "respond", None)
    before = {path.name: path.read_bytes() for path in (run / "evaluations" / "step-100").iterdir()}
    assert main(command) == 0
    assert before == {path.name: path.read_bytes() for path in (run / "evaluations" / "step-100").iterdir()}
    # what a run that trained with a prompt of its own needs to know
    assert "the template eval-r1-zero (the run trained with r1-zero)" in caplog.text
    assert main([*command, "--max_pixels", "1568"]) == 2
    assert (
        "cvbench.jsonl: holds responses under other settings (max_pixels: 784 there, 1568 now)"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--bench", "cvbensh"], "did you mean cvbench"),
        (["--bench", ","], "name at least one"),
        (["--data", "cvbench"], "BENCH=PATH"),
        (["--data", "blink=x"], "add it with --bench cvbench,blink"),
        (["--data", "blimk=x"], "one of cvbench"),
        (["--data", "cvbench={tmp}/gone.parquet"], "gone.parquet"),
        (["--data", "cvbench=nobody/CV-Bench"], "--data cvbench=PATH"),
        (["--template", "eval-r2"], "did you mean"),
        (["--limit", "0"], "--limit 0"),
        (["--limt", "3"], "did you mean --limit"),
        (["--max_pixels", "1"], "max_pixels 1"),
        (["--model", "{tmp}/no-model"], "no-model"),
        (["--model", "nobody/no-such-model"], "nobody/no-such-model"),
        (["--output_dir", "{tmp}/file"], "file"),
        (["--rescore"], "there is no cvbench.jsonl"),
    ],
)
def test_a_mistake_costs_one_line(more, message, files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    given = ["eval", "--model", "tiny-spatial-base", "--bench", "cvbench", "--data", f"cvbench={files['cvbench']}"]
    assert main([*given, *(flag.format(tmp=tmp_path) for flag in more)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_rescoring_mends_the_rows_as_well(evaluated, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(evaluated[0], copy)
    path = copy / "evaluations" / "step-100" / "vsr.jsonl"
    rows = rows_of(path)
    rows[0] |= {"response": f"<answer>{rows[0]['gold']}</answer>"}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = str(copy / "checkpoints" / "step-100")
    assert main(["eval", "--model", model, "--rescore", "--bench", "vsr"]) == 0
    mended = rows_of(path)
    assert mended[0]["correct"] and mended[0]["strict_correct"] and mended[1:] == rows[1:]
