"""What a message suggests for a path or a name that is nowhere."""

import pytest

from vtfast.config import SettingsError, load_config
from vtfast.data.files import find_files
from vtfast.errors import UserError
from vtfast.hub import model_path
from vtfast.suggestions import DATA, MODELS, SHIPPED, did_you_mean, near


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with one run, where no hub is."""
    (tmp_path / "runs" / "tiny-spatial" / "checkpoints" / "step-10").mkdir(parents=True)
    (tmp_path / "runs" / "tiny-spatial" / "config.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("Qwen2-VL-2B", "Qwen/Qwen2-VL-2B"),
        ("qwen2-vl-2b", "Qwen/Qwen2-VL-2B"),
        ("Qwen2VL-2B", "Qwen/Qwen2-VL-2B"),
        ("qwen/Qwen2-VL-2B", "Qwen/Qwen2-VL-2B"),
        ("Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"),
        ("tiny-spatial-bas", "tiny-spatial-base"),
        ("runs/tiny-spatal", "runs/tiny-spatial"),
        ("runs/tiny-spatal/checkpoints/step-10", "runs/tiny-spatial/checkpoints/step-10"),
        ("runs/tiny-spatal/checkpoints/step-999", "runs/tiny-spatial/checkpoints"),
        ("rusn/tiny-spatial/config.yaml", "runs/tiny-spatial/config.yaml"),
        ("Qwen/Qwen2-VL-2B", None),  # nothing to mend
        ("somebody/else-entirely", None),
        ("zebra", None),
        ("", None),
        ("runs/tiny-spatial/config.yaml/inside", None),
    ],
)
def test_models(said, meant):
    assert near(said, MODELS, SHIPPED) == meant


@pytest.mark.parametrize(
    ("said", "meant"),
    [("SAT", "array/SAT"), ("arrays/SAT", "array/SAT"), ("sinthetic", "synthetic"), ("x", None)],
)
def test_data(said, meant):
    assert near(said, DATA, ["synthetic"]) == meant


def test_the_exact_name_of_an_id_goes_before_a_folder_that_is_nearly_called_so(tmp_path):
    (tmp_path / "Qwen2-VL-7B").mkdir()
    assert near("Qwen2-VL-2B", MODELS) == "Qwen/Qwen2-VL-2B"
    assert near("Qwen2-VL-7", MODELS) == "Qwen2-VL-7B"


def test_without_a_neighbour_the_message_says_what_to_do():
    assert did_you_mean("zebra", "name a folder", MODELS) == "name a folder"
    assert did_you_mean("runs/tiny", "name a folder") == "name a folder"


def test_a_path_that_no_system_takes():
    assert near("x" * 5000) is None
    assert near("~nobody-of-that-name/x") is None


@pytest.mark.parametrize("said", ["SAT", "nobody/SAT"])
def test_where_data_are_looked_for(said):
    with pytest.raises(UserError, match=r"did you mean array/SAT\?"):
        find_files(said, None, stream=True)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("Qwen2-VL-2B", r"no model folder Qwen2-VL-2B; did you mean Qwen/Qwen2-VL-2B\?$"),
        ("runs/tiny-spatal", r"is no local path \(did you mean runs/tiny-spatial\?\), and the"),
        ("runs/tiny-spatial/config.yaml", r"it is a file; give a checkpoint folder or a hub id"),
        ("zebra", r"no model folder zebra; give a checkpoint folder or a hub id such as Qwen/"),
    ],
)
def test_where_a_model_is_looked_for(said, told):
    with pytest.raises(UserError, match=told):
        model_path(said)


def test_where_settings_are_looked_for():
    with pytest.raises(
        SettingsError, match=r"no such file; did you mean runs/tiny-spatial/config.yaml\?"
    ):
        load_config(file="runs/tiny-spatial/confg.yaml")
