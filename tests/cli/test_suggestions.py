"""What a message suggests for a path or a name that is nowhere."""

import errno
import os
from pathlib import Path

import pytest

from vtfast.cli.main import main
from vtfast.config import SettingsError, load_config
from vtfast.data.data_files import find_files
from vtfast.utils.did_you_mean import did_you_mean, near_run
from vtfast.utils.errors import UserError
from vtfast.utils.hub import DATASETS, model_path


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with one run, where no hub is."""
    (tmp_path / "runs" / "tiny-spatial" / "checkpoints" / "step-10").mkdir(parents=True)
    (tmp_path / "runs" / "tiny-spatial" / "config.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def meant(path: str, *known: str) -> str | None:
    text = did_you_mean(path, "nothing", known)
    return None if text == "nothing" else text.removeprefix("did you mean ").removesuffix("?")


@pytest.mark.parametrize(
    ("path", "suggestion"),
    [
        ("tiny-spatial-bas", "tiny-spatial-base"),
        ("runs/tiny-spatal", "runs/tiny-spatial"),
        ("rnus", "runs"),
        ("runs/tiny-spatial/checkpoints/step-11", "runs/tiny-spatial/checkpoints/step-10"),
        ("runs/tiny-spatal/checkpoints/step-10", None),  # the folder in which it would be does not exist
        ("somebody/else-entirely", None),
        ("zebra", None),
        ("", None),
        ("runs/tiny-spatial/config.yaml/inside", None),
    ],
)
def test_a_path_is_compared_with_its_siblings_and_with_known_names(path, suggestion):
    assert meant(path, "tiny-spatial-base") == suggestion


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("SAT", "array/SAT"), ("arrays/sat", "array/SAT"), ("sinthetic", "synthetic"), ("x", None), ("array/SAT", None)],
)
def test_an_id_of_the_hub_is_known_by_its_name_alone(name, suggestion):
    assert meant(name, *DATASETS, "synthetic") == suggestion


def test_without_a_neighbour_the_message_says_what_to_do():
    assert did_you_mean("zebra", "name a folder", DATASETS) == "name a folder"
    assert did_you_mean("runs/tiny", "name a folder") == "name a folder"


def test_a_path_that_no_system_takes():
    assert meant("x" * 5000) is None
    assert meant("~nobody-of-that-name/x") is None
    assert meant("nul\0l/x") is None


@pytest.mark.parametrize("said", ["SAT", "nobody/SAT"])
def test_where_data_are_looked_for(said):
    with pytest.raises(UserError, match=r"did you mean array/SAT\?"):
        find_files(said, None, stream=True)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("Qwen2-VL-2B", r"no model folder Qwen2-VL-2B; give a checkpoint folder or a hub id such as Qwen/Qwen2-VL-2B$"),
        ("runs/tiny-spatal", r"is no local path \(did you mean runs/tiny-spatial\?\), and the"),
        ("runs/tiny-spatial/config.yaml", r"it is a file; give a checkpoint folder or a hub id"),
        ("zebra", r"no model folder zebra; give a checkpoint folder or a hub id such as Qwen/"),
    ],
)
def test_where_a_model_is_looked_for(said, told):
    with pytest.raises(UserError, match=told):
        model_path(said)


def test_where_settings_are_looked_for():
    with pytest.raises(SettingsError, match=r"no such file; did you mean runs/tiny-spatial/config.yaml\?"):
        load_config(file="runs/tiny-spatial/confg.yaml")


@pytest.mark.parametrize(
    ("path", "run"),
    [
        ("runs", "runs/tiny-spatial"),
        ("runs/tiny-spatial/checkpoints/step-10", "runs/tiny-spatial"),
        ("runs/tiny-spatial/checkpoints/step-10/config.json", "runs/tiny-spatial"),
        ("runs/tiny-spatial/metrics.jsonl", "runs/tiny-spatial"),
        (".", None),
    ],
)
def test_the_run_that_a_path_lies_in_or_that_lies_in_it(path, run):
    assert near_run(Path(path)) == run


def test_a_run_is_found_beside_folders_that_nobody_may_look_into(monkeypatch):
    """As in /tmp, where a service has a folder of its own. Tests may run as root, whom nothing is denied."""
    Path("runs/another").mkdir()
    stat = os.stat

    def denied(path, **options):
        if "another" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", denied)
    assert near_run(Path("runs")) == "runs/tiny-spatial"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("report runs", "; did you mean runs/tiny-spatial?"),
        ("report runs/tiny-spatial/config.yaml", "is a file; did you mean runs/tiny-spatial?"),
        ("report runs/tiny-spatial/checkpoints/step-10", "; did you mean runs/tiny-spatial?"),
        ("eval --model runs", "; did you mean runs/tiny-spatial?"),
        ("--hlp", "did you mean --help?"),
        ("eval --model m --bench vsr blink", "take commas, --bench cvbench,blink,vsr,sat"),
        ("eval --model m --data rows.jsonl", "such as --data cvbench=rows.jsonl, with"),
        ("train --template promt.txt", "no such file; did you mean prompt.txt?"),
        ("data inspect rows.jsonl --model runs/tiny-spatial", "such as runs/tiny-spatial/checkpoints/step-10"),
        ("data inspect runs", "no .parquet, .jsonl or .json file (there is: nothing)"),
        ("migrate runs", "runs: cannot be read (is a folder)"),
        ("data inspect rows.csv", "pandas converts a CSV"),
        ("data inspect lfs.parquet", "run `git lfs pull`"),
        ("data inspect torn.parquet", "; download it again"),
        ("data inspect one.json", "a file with one row per line is called .jsonl"),
    ],
)
def test_what_the_commands_tell(words, told, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("{question}")
    (tmp_path / "rows.csv").write_text("question,answer\n")
    (tmp_path / "lfs.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (tmp_path / "torn.parquet").write_text("PAR1")
    (tmp_path / "one.json").write_text('{"question": "?"}')
    assert main(words.split()) == 2
    assert told in capsys.readouterr().err
