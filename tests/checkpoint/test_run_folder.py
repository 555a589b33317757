"""What a run leaves alone, refuses, and repairs in the folder that it goes on in."""

import shutil
from pathlib import Path

import pytest
from whole_runs import build, rows, run

from vtfast.data import splits
from vtfast.training.checkpoint import checksums as files
from vtfast.training.checkpoint import keep_data
from vtfast.utils.errors import UserError


@pytest.fixture(scope="module")
def whole(tmp_path_factory, sft):
    """Two supervised steps, a checkpoint each."""
    return run(tmp_path_factory.mktemp("run") / "whole", **sft | {"max_steps": 2})


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "run"))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Without config.yaml


@pytest.mark.parametrize(
    "flags",
    [
        {"output_dir": "", "resume_from_checkpoint": "last"},
        {"output_dir": "", "resume_from_checkpoint": "checkpoints/step-1"},
        {"resume_from_checkpoint": ""},
        {"resume_from_checkpoint": "checkpoints/step-1"},
    ],
)
def test_a_run_without_its_settings_is_refused_and_left_alone(flags, copy, sft):
    """Nothing says whose the logs are that would be cut back, nor that they are all there is."""
    flags = {k: v if v == "last" else str(copy / v) for k, v in flags.items()}
    settings = sft | {"max_steps": 2} | flags
    (copy / "config.yaml").unlink()
    before = contents(copy)
    with pytest.raises(UserError, match=r"name a new.*config\.yaml|config\.yaml.*name a new"):
        build(**settings)
    assert contents(copy) == before
    (copy / "config.yaml").write_bytes((copy / "checkpoints/step-1" / files.SETTINGS).read_bytes())
    trainer = build(**settings)
    assert trainer.session.folder == copy
    assert [row["step"] for row in rows(copy)] == list(range(1, trainer.session.step + 1))


def test_a_run_inside_another_is_not_gone_on_with_in_the_outer_one(copy, whole, sft):
    inner = shutil.copytree(whole, copy / "old")
    before = contents(copy)
    with pytest.raises(UserError, match=r"is not the run folder of .*old/checkpoints/step-1"):
        build(
            output_dir=str(copy), resume_from_checkpoint=str(inner / "checkpoints" / "step-1"), **sft | {"max_steps": 2}
        )
    assert contents(copy) == before


# Parts of the optimizer that nothing vouches for


@pytest.mark.parametrize("wanted", ["last", "step"])
def test_a_part_that_the_sums_do_not_list_is_refused_by_name(wanted, copy, sft):
    folder = copy / "checkpoints" / "step-2"
    stranger = folder / "resume" / "rank-1.safetensors"
    shutil.copy(folder / "resume" / "rank-0.safetensors", stranger)
    before = contents(copy)
    wanted = wanted if wanted == "last" else str(folder)
    settings = sft | {"max_steps": 2, "output_dir": str(copy), "resume_from_checkpoint": wanted}
    with pytest.raises(UserError, match=r"step-2/resume/rank-1\.safetensors: is not listed in"):
        build(**settings)
    assert contents(copy) == before
    stranger.unlink()
    assert build(**settings).session.step == 2


# The rendered questions


class Killed(Exception):
    pass


def test_rendered_questions_are_in_the_run_folder_whole_or_not_at_all(tmp_path, monkeypatch):
    """The first start is killed in the middle of the second file."""

    def dies(source, to):
        train, val = sorted(Path(source).iterdir())
        Path(to).mkdir()
        shutil.copy(train, to)
        (Path(to) / val.name).write_bytes(val.read_bytes()[:100])
        raise Killed

    monkeypatch.setattr(splits, "SYNTHETIC_TRAIN", 12)
    settings = {
        "data": "synthetic",
        "eval_data": "synthetic",
        "recipe": "tiny-spatial-sft",
        "max_steps": 1,
        "output_dir": str(tmp_path / "run"),
        "resume_from_checkpoint": "last",
        "eval_samples": 4,
    }
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "copytree", dies)
        build(**settings)
    assert not (tmp_path / "run" / "data").exists()
    assert (tmp_path / "run" / ".data.partial").is_dir()
    build(**settings)
    folder = tmp_path / "run" / "data"
    assert sorted(path.name for path in folder.iterdir()) == ["train.parquet", "val.parquet"]
    assert not list((tmp_path / "run").rglob(".*.partial"))


def test_data_that_is_there_already_stays(tmp_path):
    for name in ("rendered", "run/data"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "train.parquet").write_text(name)
    keep_data(tmp_path / "rendered", tmp_path / "run")
    assert (tmp_path / "run" / "data" / "train.parquet").read_text() == "run/data"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["data"]
