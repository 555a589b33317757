"""Mistakes on the command line of each command: all of them told at once, in a moment, and nothing left behind."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vtfast.cli.arguments import Parser, one_of, setting_help, whole_number
from vtfast.cli.main import main
from vtfast.config import Config, SettingsError, SFTConfig, field_help, recipe_names

COMMANDS = ["train", "sft", "data", "eval", "report", "migrate", "make-base"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def problems(capsys) -> list[str]:
    """What was told, a line a problem."""
    first, *rest = capsys.readouterr().err.rstrip("\n").split("\n")
    assert first.startswith("error: ")
    if not rest:
        return [first.removeprefix("error: ")]
    assert first == f"error: {len(rest)} problems:"
    return [line.removeprefix("  ") for line in rest]


# ---------------------------------------------------------------------------------------- parser


def parser() -> Parser:
    made = Parser(prog="p", checks={"count": whole_number(1), "kind": one_of("a", "b")})
    made.add_argument("place")
    made.add_argument("--count", default=7)
    made.add_argument("--kind", default="a")
    made.add_argument("--name", action="append")
    return made


def test_values_are_checked_and_turned():
    options = parser().parse(["x", "--count", "3", "--name", "m", "--name", "n"])
    assert vars(options) == {"place": "x", "count": 3, "kind": "a", "name": ["m", "n"]}
    assert parser().parse(["x"]).count == 7


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["x", "--count", "0"], ["--count 0: must be at least 1"]),
        (["x", "--count", "-3"], ["--count -3: must be at least 1"]),
        (["x", "--count=1.5"], ["--count 1.5: must be a whole number"]),
        (["x", "--count"], ["--count: needs a value; see p --help"]),
        (["x", "--name", "--kind", "b"], ["--name: needs a value; see p --help"]),
        (["x", "--kind", "c"], ["--kind c: must be one of a, b"]),
        (["--kind", "b"], ["place: is required; see p --help"]),
        (["--", "-h", "y"], ["y: does not belong to any flag; see p --help"]),
        (
            ["--count", "0", "--kin=b", "--name"],
            [
                "--kin: unknown flag; did you mean --kind?",
                "--name: needs a value; see p --help",
                "--count 0: must be at least 1",
                "place: is required; see p --help",
            ],
        ),
    ],
)
def test_all_that_is_wrong_is_told(words, told):
    with pytest.raises(SettingsError) as stopped:
        parser().parse(words)
    assert stopped.value.problems == told


# ------------------------------------------------------------------------------------------ help


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("Rank of the adapters.", "Rank of the adapters"),
        ("Only N rows; none means all.", "Only N rows; none means all"),
        ("Only N rows; the rest waits.", "Only N rows"),
        ("A path, e.g. X. It is read.", "A path, e.g. X. It is read"),
        ("On CUDA alone. The CPU does\n without.", "On CUDA alone"),
        ("A third, 50 %.", "A third, 50 %%"),
    ],
)
def test_a_settings_help_is_its_first_statement_and_its_default(text, short):
    assert setting_help(text, "7") == f"{short} (default 7)"
    assert setting_help(text, "7", short=False).startswith(" ".join(text.split())[:-1].replace("%", "%%"))


def help_of(command: str, capsys, flag: str = "--help") -> str:
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), flag])
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", [c if c != "data" else "data inspect" for c in COMMANDS])
def test_help_shows_defaults_and_an_example(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    text = help_of(command, capsys)
    name = f"vtfast {command}"
    assert text.startswith(f"usage: {name} ") and f"{name} " in text[text.index("\nexample") :]
    flags = text[text.index("--help") : text.index("\nexample")].split("\n  --")[1:]
    without = {f"--{flag.split()[0]}" for flag in flags if "default" not in flag}
    assert without <= {
        "--json",
        "--rescore",
        "--fetch_images",
        "--config",
        "--dry_run,",
        "--gpu_memory_gb",
        "--help_all",
        "--model",
    }


@pytest.mark.parametrize(("command", "kind"), [("train", Config), ("sft", SFTConfig)])
def test_help_breaks_no_name_in_two(command, kind, capsys):
    text = help_of(command, capsys)
    assert [name for name in recipe_names(kind) if name not in text] == []


def test_help_speaks_of_the_door_that_was_taken(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/train.py", "--help"])
    text = help_of("train", capsys)
    assert text.startswith("usage: python train.py ") and "example: python train.py " in text


@pytest.mark.parametrize("kind", [Config, SFTConfig])
def test_no_settings_short_help_ends_inside_parentheses(kind):
    for name, text in field_help(kind).items():
        short = setting_help(text, "")
        assert short.count("(") == short.count(")"), name


@pytest.mark.parametrize("command", ["train", "sft"])
def test_help_all_says_more(command, capsys):
    short, all_of_it = help_of(command, capsys), help_of(command, capsys, "--help_all")
    assert len(short) < 0.85 * len(all_of_it)
    assert "Lower it to what your slowest" in all_of_it and "Lower it to what" not in short


# ------------------------------------------------------------------------------------------ eval


def test_eval_tells_all_mistakes_at_once(here, capsys):
    (here / "runs" / "mine").mkdir(parents=True)
    (here / "taken").write_text("")
    line = """eval --model runs/mime --limit 0 --batch_size -2 --max_completion_length many --bench cvbnch,vsr
        --min_pixels 9 --max_pixels 3 --template r2-zero --output_dir taken --image_folder coco --data vsr
        --dtype float16"""
    assert main(line.split()) == 2
    told = problems(capsys)
    starts = [
        "--limit 0: must be at least 1",
        "--max_completion_length many: must be a whole number",
        "--batch_size -2: must be at least 1",
        "--dtype float16: must be one of auto, float32, bfloat16",
        "--bench cvbnch: unknown; did you mean cvbench?",
        "--data vsr: expected BENCH=PATH, such as --data vsr=FOLDER",
        "--template r2-zero: unknown prompt template",
        "--min_pixels 9: must be at most --max_pixels 3",
        "--output_dir taken: is a file; name a folder",
        "--image_folder coco: no such folder",
        "--model runs/mime: runs/mime is no local path (did you mean runs/mine?)",
    ]
    assert len(told) == len(starts)
    for line, start in zip(told, starts, strict=True):
        assert line.startswith(start)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model", "Qwen2-VL-2B"], "or a hub id such as Qwen/Qwen2-VL-2B"),
        (["--model", "m", "--data", "blink=x"], "--data blink=x: blink is not among the benchmarks; add it with"),
        (["--model", "m", "--fetch_images"], "--fetch_images: has an effect only with --bench vsr"),
        (["--model", "m", "--bench", ","], "--bench: name at least one of cvbench"),
        (["--model", "m", "--output_dir", f"{__file__}/x"], f"{__file__} is a file; name a folder"),
        (["--model", "m", "--bench", "mmstar"], "--bench mmstar: unknown; there are cvbench, blink"),
    ],
)
def test_eval_tells_what_to_do(words, told, capsys):
    assert main(["eval", *words]) == 2
    assert any(told in line for line in problems(capsys))


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "is neither a run folder (it has no config.yaml) nor a model folder (no config.json)"),
        ({"config.yaml": "max_steps: 3\n"}, "is a run that has saved no checkpoint yet"),
        ({"config.json": "{}"}, "has no *.safetensors weights"),
    ],
)
def test_eval_looks_at_the_model_before_the_data(files, told, here, capsys):
    """The data do not exist either, and could be a download of gigabytes."""
    (here / "m").mkdir()
    for name, text in files.items():
        (here / "m" / name).write_text(text)
    assert main(["eval", "--model", "m", "--data", "cvbench=gone"]) == 2
    (line,) = problems(capsys)
    assert line.removeprefix("--model ").startswith("m: ") and told in line


# ------------------------------------------------------------------------- data inspect, make-base


def test_data_inspect_tells_all_mistakes_at_once(capsys):
    words = "data inspect --limit 0 --static maybe --qestion_column=q --max_pixels -1"
    assert main(words.split()) == 2
    assert [line.split("; ")[0] for line in problems(capsys)] == [
        "--qestion_column: unknown flag",
        "--limit 0: must be at least 1",
        "vtfast data inspect: give a PATH (a file, a folder or a hub id)",
        "--static maybe: must be true or false",
        "--max_pixels -1: smaller than --min_pixels 3136",
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["taken"], ["taken: exists already; name a new folder"]),
        (["taken/base"], ["taken/base: cannot be made in taken; name a folder that can"]),
        (["new", "--seed", "-1"], ["--seed -1: must be at least 0"]),
        (["taken", "--seed", "x"], ["--seed x: must be a whole number", "taken: exists already"]),
        ([], ["OUT: is required"]),
    ],
)
def test_make_base_refuses_before_it_trains(words, told, here, capsys, monkeypatch):
    (here / "taken").write_text("")
    assert main(["make-base", *words]) == 2
    lines = problems(capsys)
    assert len(lines) == len(told)
    assert all(line.startswith(start) for line, start in zip(lines, told, strict=True))
    assert [path.name for path in here.iterdir()] == ["taken"]


# ------------------------------------------------------------------------------------------ speed


SPEED = """
import sys
from vtfast.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as stopped:
    code = stopped.code
heavy = sorted({"torch", "transformers", "pyarrow", "deepspeed"} & set(sys.modules))
sys.exit(f"imported {heavy}" if heavy else code)
"""


@pytest.mark.parametrize(
    ("words", "code"),
    [
        *((f"{command} --help", 0) for command in COMMANDS),
        ("--help", 0),
        ("eval --model Qwen2-VL-2B --limit 0", 2),
        ("data inspect SAT --limit 0", 2),
        ("train --lr 1", 2),
    ],
)
def test_help_and_mistakes_import_nothing_heavy(words, code):
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r})\n{SPEED}", *words.split()],
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr


# ------------------------------------------------------------------------------------ a closed pipe


@pytest.mark.parametrize("words", ["train --dry-run --device cpu", "migrate 'python grpo.py --beta 0'"])
def test_output_that_nobody_reads_is_no_error(words):
    """`vtfast train --dry-run | head -1`"""
    program = "import sys; from vtfast.cli import main; sys.exit(main(sys.argv[1:]))"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", program, *shlex.split(words)],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    os.close(writing)
    assert done.returncode == 141 and "Traceback" not in done.stderr and "Broken" not in done.stderr
