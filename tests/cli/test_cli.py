"""The command line as a person meets it: help, dry runs, and mistakes that cost one line and exit code 2."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vtfast.cli.main import main
from vtfast.config import field_names

cli = sys.modules["vtfast.cli.main"]  # its name in the package is the function's
ROOT = Path(__file__).parents[2]


def test_dry_run_prints_the_resolved_recipe(capsys):
    assert main(["train", "--recipe", "visualthinker-2b-sat", "--dry-run", "--beta", "0.1"]) == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    assert settings["beta"] == 0.1 and settings["max_completion_length"] == 700
    assert list(settings) == list(field_names())


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and all(f"--{name}" in text for name in field_names())
    assert main([]) == 0 and "make-base" in capsys.readouterr().out


@pytest.mark.parametrize(("command", "own", "rate"), [("train", "GRPO:", "1e-06"), ("sft", "SFT:", "2e-05")])
def test_help_comes_by_section_with_defaults(command, own, rate, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    heads = [line for line in text.splitlines() if line.endswith(":") and line[0] != " "]
    assert heads == ["options:", "Task:", own, "Rollout:", "Optimizer:", "Output:"]
    settings = text[text.index("Task:") : text.index("example:")].split("\n  --")[1:]
    default = {entry.split()[0]: re.search(r"\(default (\S+)\)", entry)[1] for entry in settings}
    assert default["learning_rate"] == rate and default["use_peft"] == "false"
    assert default["max_steps"] == ("200" if own == "GRPO:" else "none")
    assert default["report_to"] == "tensorboard" and default["template"] == "r1-zero"


@pytest.fixture
def broken(tmp_path):
    """Inputs that a person could give by mistake, by name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "empty_model").mkdir()
    (tmp_path / "empty_model" / "config.json").write_text('{"model_type": "qwen2_vl"}')
    pq.write_table(pa.table({"question": ["Where?"], "reply": ["left"]}), tmp_path / "columns.parquet")
    unreadable = {
        "image_bytes": [[b"\xff\xd8 not a picture \xff\xd9"]],
        "question": ["Is it left?"],
        "answers": [["yes", "no"]],
        "question_type": ["other"],
        "correct_answer": ["yes"],
    }
    pq.write_table(pa.table(unreadable), tmp_path / "picture.parquet")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_generatons", "4"], "did you mean --num_generations"),
        (["--beta", "big"], "--beta big: must be a finite number"),
        (["--data", "{tmp}/gone.parquet"], "gone.parquet"),
        (["--data", "{tmp}/columns.parquet"], "columns.parquet"),
        (["--data", "{tmp}/picture.parquet", "--eval_data", "none"], "picture.parquet"),
        (["--data", "nobody/no-such-set"], "nobody/no-such-set"),
        (["--model", "{tmp}/empty_model"], "empty_model"),
        (["--model", "nobody/no-such-model"], "nobody/no-such-model"),
        (["--template", "r2-zero"], "r1-zero"),
        (["--reward_funcs", "acuracy"], "accuracy"),
        (["--report_to", "trackio"], "trackio"),
        (["--output_dir", "{tmp}/full"], "never overwritten (name a new one)"),
        (["--config", "{tmp}/gone.yaml"], "gone.yaml"),
    ],
)
def test_a_mistake_costs_one_line_and_leaves_nothing(flags, message, broken, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(broken)
    before = sorted(broken.rglob("*"))
    flags = [flag.format(tmp=broken) for flag in flags]
    if "--output_dir" not in flags:
        flags += ["--output_dir", str(broken / "run")]
    assert main(["train", "--max_steps", "1", *flags]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0] and lines[-1] == errors[0]
    assert not any("Traceback" in line for line in lines)
    assert sorted(broken.rglob("*")) == before, "a failed start must leave no folder behind"


def test_mistakes_of_all_kinds_are_told_at_once(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("lerning_rate: 1\nmax_steps: 0\n")
    flags = ["--config", str(tmp_path / "mine.yaml"), "--recipe", "x", "--bta", "1", "--beta=much", "stray"]
    assert main(["train", *flags]) == 2
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == f"error: {len(lines)} problems:"
    told = [
        "--bta: unknown flag; did you mean --beta?",
        "stray: does not belong to any flag",
        "--recipe and --config: give one of them",
        f"{tmp_path / 'mine.yaml'}:1: --lerning_rate: unknown",
        f"{tmp_path / 'mine.yaml'}:2: --max_steps 0",
        "--beta much: must be a finite number",
    ]
    assert len(lines) == len(told)
    for line, start in zip(lines, told, strict=True):
        assert line.startswith(f"  {start}")


def test_train_py_exits_with_2(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--no_such_flag", "1"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2 and done.stderr.startswith("error: --no_such_flag")


def test_unknown_command(capsys):
    assert main(["trian"]) == 2 and "did you mean train" in capsys.readouterr().err
    assert main(["inspect"]) == 2 and "there are train, sft, data" in capsys.readouterr().err


def test_version(capsys):
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("vtfast ")


@pytest.mark.parametrize(
    ("command", "flag", "hint"),
    [
        ("train", "--lr", "did you mean --learning_rate?"),
        ("train", "--bach_size", "did you mean --per_device_train_batch_size?"),
        ("train", "--epochs", "did you mean --max_steps?"),
        ("sft", "--epochs", "did you mean --num_train_epochs?"),
        ("train", "--target", "vtfast sft has it"),
        ("sft", "--beta", "vtfast train has it"),
    ],
)
def test_a_flag_under_another_name(command, flag, hint, capsys):
    assert main([command, flag, "1"]) == 2
    assert capsys.readouterr().err.strip() == f"error: {flag}: unknown flag; {hint}"


def test_a_switch_alone_means_true(capsys):
    assert main(["train", "--dry-run", "--use_peft", "--static", "false"]) == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    assert settings["use_peft"] is True and settings["static"] is False


def test_what_is_missing_is_told_with_what_is_misspelt(capsys):
    assert main(["eval", "--modle", "runs/x"]) == 2
    told = capsys.readouterr().err.splitlines()[1:]
    assert [line.split(";")[0] for line in told] == ["  --modle: unknown flag", "  --model: is required"]
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    assert "[-h] --model MODEL" in capsys.readouterr().out


def test_a_python_without_torch_is_told_where_there_is_one(monkeypatch, capsys):
    from vtfast.cli import train

    def lacks(name):
        def run(arguments):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        monkeypatch.setattr(train, "run", run)

    lacks("torch")
    assert main(["train"]) == 2 and ". .venv/bin/activate" in capsys.readouterr().err
    lacks("vtfast.no_such")  # a bug of ours keeps its traceback
    with pytest.raises(ModuleNotFoundError):
        main(["train"])


def test_a_stopped_run_has_an_exit_code_of_its_own(monkeypatch, capsys):
    """A scheduler starts it again with the same command."""
    from vtfast.cli import train

    def stopped(arguments):
        raise cli.Stopped("stopped by SIGTERM after step 3")

    monkeypatch.setattr(train, "run", stopped)
    assert cli.main(["train"]) == cli.STOPPED == 75
    assert capsys.readouterr().err == "stopped by SIGTERM after step 3\n"


def test_a_full_disk_is_no_bug(monkeypatch, capsys):
    """Wherever it is met: a small file of a step, a plot behind the last one."""
    from vtfast.cli import train

    def full(arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run/curves.png")

    monkeypatch.setattr(train, "run", full)
    assert cli.main(["train"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: run/curves.png: No space left on device; make room")


def test_a_path_of_somebody_elses_is_no_bug(monkeypatch, capsys):
    """Folders that only their owner may look into: the system raises where one asks whether a file is there."""
    from vtfast.cli import train

    def denied(arguments):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/home/other/config.yaml")

    monkeypatch.setattr(train, "run", denied)
    assert cli.main(["train"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: /home/other/config.yaml: Permission denied; name another path")


def test_other_errors_of_the_system_keep_their_traceback(monkeypatch):
    from vtfast.cli import train

    def missing(arguments):
        raise FileNotFoundError(errno.ENOENT, "not there", "x")

    monkeypatch.setattr(train, "run", missing)
    with pytest.raises(FileNotFoundError):
        cli.main(["train"])
