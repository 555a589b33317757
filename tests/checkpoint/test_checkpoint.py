"""Checkpoints on disk: whole or not there, checked before they are used, and what a run does about the damaged ones."""

import json
import logging
import os
import pickle
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from whole_runs import assert_same_run, build, flip, rows, run, step, steps, truncate, unequal, weights

from vtfast.cli.config_flags import read_settings
from vtfast.config import Config, SFTConfig
from vtfast.training.checkpoint import checksums as files
from vtfast.training.checkpoint import save, settings_of
from vtfast.training.checkpoint.find import find_checkpoint
from vtfast.training.checkpoint.rng import rng_state, set_rng_state
from vtfast.utils.errors import UserError


def relist(path: Path, name: str, size: float) -> None:
    sums = json.loads(path.read_text()) | {name: {"size": size, "sha256": "x"}}
    path.write_text(json.dumps(sums))


DAMAGE = {
    "weights cut off": ("model.safetensors", truncate, "bytes instead of"),
    "a bit of the weights": ("model.safetensors", flip, "is damaged"),
    "a bit of the optimizer": ("resume/rank-0.safetensors", flip, "is damaged"),
    "no optimizer": ("resume/rank-0.safetensors", Path.unlink, "is missing"),
    "a tokenizer file gone": ("tokenizer.json", Path.unlink, "is missing"),
    "settings edited": ("resume/config.yaml", flip, "is damaged"),
    "an empty state": ("resume/state.json", lambda path: os.truncate(path, 0), "has 0 bytes"),
    "sums cut off": ("resume/checksums.json", truncate, "is damaged"),
    "no sums": ("resume/checksums.json", Path.unlink, "is missing"),
    "empty sums": ("resume/checksums.json", lambda path: path.write_text("{}"), "does not list"),
    "sums without end": ("resume/checksums.json", lambda path: path.write_text("[" * 100_000), "is damaged"),
    "sums of infinite files": ("resume/checksums.json", lambda path: relist(path, "config.json", 1e999), "is damaged"),
    "a list for sums": ("resume/checksums.json", lambda path: path.write_text("[]"), "is damaged"),
}


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_damage_is_named_and_the_one_before_taken(kind, copy, caplog):
    name, spoil, message = DAMAGE[kind]
    spoil(step(copy, 4) / name)
    with caplog.at_level(logging.WARNING, "vtfast"):
        found = find_checkpoint(config(copy, "last"))
    assert found.folder == step(copy, 3) and found.state.step == 3
    assert f"step-4: {name}" in caplog.text and message in caplog.text
    with pytest.raises(UserError, match=f"{name}.*{message}"):
        find_checkpoint(config(copy, str(step(copy, 4))))


def config(folder: Path | None, wanted: str) -> SimpleNamespace:
    folder = None if folder is None else str(folder)
    return SimpleNamespace(output_dir=folder, resume_from_checkpoint=wanted, max_steps=4)


@pytest.mark.parametrize("wanted", ["last", "step-4"])
def test_damaged_settings_are_not_taken_up(copy, wanted):
    flip(step(copy, 4) / "resume" / "config.yaml")
    if wanted == "last":
        assert settings_of("last", str(copy)) == step(copy, 3) / "resume" / "config.yaml"
    else:
        with pytest.raises(UserError, match=r"config\.yaml is damaged"):
            settings_of(str(step(copy, 4)), None)


FOREIGN = {
    "another format": ("format", 2, "format: Input should be 1"),
    "no step": ("step", None, "step: Input should be a valid integer"),
    "a step in words": ("step", "four", "step: Input should be a valid integer"),
    "a step below 0": ("step", -4, "step: Input should be greater than or equal to 0"),
    "no schedule": ("schedule", {}, "schedule.last_epoch: Field required"),
    "counters of text": ("counters", {"global_steps": "4"}, "counters.global_steps: Input should be a valid integer"),
    "optimizer of text": ("optimizer", [{"step": "4"}], "optimizer.0.step: Input should be a valid number"),
    "optimizer of lists": ("optimizer", [[4]], "optimizer.0: Input should be an object"),
    "two groups": ("optimizer", [{"step": 4.0}, {"step": 4.0}], "was written by another version"),
    "held-out in short": ("before", {"scores": {}}, "before.count: Field required"),
    "no samples": ("samples", ..., "samples: Field required"),
    "nothing carried": ("carried", {}, "was written by another version"),
    "more carried": ("carried", {"health": {"alarms": [], "mood": 1}}, "was written by another version"),
    "another step": ("step", 3, "was saved at step 3; rename it back to step-3"),
}


@pytest.mark.parametrize("kind", list(FOREIGN))
def test_a_state_of_somebody_elses(kind, copy, sft):
    """Whole by its sums, and not what this version writes."""
    key, value, message = FOREIGN[kind]
    path = step(copy, 4) / "resume" / "state.json"
    state = json.loads(path.read_text()) | {key: value}
    if value is ...:
        del state[key]
    path.write_text(json.dumps(state))
    sign(step(copy, 4))
    with pytest.raises(UserError, match=message):
        build(output_dir=str(copy), resume_from_checkpoint="last", **sft)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b"no tensors"),
        lambda path: save_file({"a": torch.ones(1)}, path),
        lambda path: save_file({"a": torch.ones(1)}, path, {"places": "[]"}),
        lambda path: save_file({"a": torch.ones(1)}, path, {"places": "{}"}),
        lambda path: save_file({"a": torch.ones(1)}, path, {"places": '{"lm_head": {"start": 0}}'}),
    ],
)
def test_an_optimizer_of_somebody_elses(write, copy, sft):
    write(step(copy, 4) / "resume" / "rank-0.safetensors")
    sign(step(copy, 4))
    with pytest.raises(UserError, match="step-4"):
        build(output_dir=str(copy), resume_from_checkpoint="last", **sft)


def test_sums_of_a_name_that_no_file_has(copy):
    relist(step(copy, 4) / files.CHECKSUMS, "a" * 5000, 1)
    assert "cannot be read (File name too long)" in files.find_damage(step(copy, 4))


def test_a_state_without_end(copy, sft):
    (step(copy, 4) / "resume" / "state.json").write_text('{"format":' + "[" * 100_000)
    sign(step(copy, 4))
    with pytest.raises(UserError, match=r"state\.json: this version of vtfast cannot read"):
        build(output_dir=str(copy), resume_from_checkpoint="last", **sft)


def test_random_numbers_that_are_missing(copy, sft):
    path = step(copy, 4) / "resume" / "rank-0.safetensors"
    with safe_open(path, framework="pt") as file:
        places = file.metadata()
    kept = {name: value for name, value in load_file(path).items() if name != "random.numpy"}
    save_file(kept, path, places)
    sign(step(copy, 4))
    with pytest.raises(UserError, match=r"step-4: was written by another version .*random\.numpy"):
        build(output_dir=str(copy), resume_from_checkpoint="last", **sft)


def sign(folder: Path) -> None:
    """Make the sums right again."""
    (folder / files.CHECKSUMS).unlink()
    listed = [path for path in folder.rglob("*") if path.is_file()]
    files.write_checksums(folder, [files.checksums_of(folder, listed)])


@pytest.mark.parametrize("wanted", ["", "checkpoints", "checkpoints/last", "checkpoints/step-4"])
def test_what_a_path_may_name(copy, wanted):
    path = str(copy / wanted)
    assert find_checkpoint(config(None, path)).folder == step(copy, 4)
    assert settings_of(path, None) == step(copy, 4) / "resume" / "config.yaml"


def test_paths_without_a_checkpoint(tmp_path):
    (tmp_path / "empty").mkdir()
    for wanted in ("empty", "nowhere"):
        for look in (lambda path: find_checkpoint(config(None, path)), lambda p: settings_of(p, None)):
            with pytest.raises(UserError, match=f"--resume_from_checkpoint .*{wanted}"):
                look(str(tmp_path / wanted))
    with pytest.raises(UserError, match="needs --output_dir"):
        find_checkpoint(config(None, "last"))


def test_all_damaged_starts_from_the_beginning(copy, whole, sft, caplog):
    """One command line starts a run and goes on with it. What was there is moved, not lost."""
    for number in range(1, 5):
        flip(step(copy, number) / "model.safetensors")
    with caplog.at_level(logging.INFO, "vtfast"):
        run(copy, resume_from_checkpoint="last", **sft)
    assert "starting from the beginning" in caplog.text
    assert_same_run(whole, copy)
    assert steps(copy / "superseded-1") == ["step-1", "step-2", "step-3", "step-4"]
    assert (copy / "superseded-1" / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


@pytest.mark.parametrize("folder", ["absent", "empty"])
def test_last_starts_a_run(folder, tmp_path, sft):
    (tmp_path / "empty").mkdir()
    run(tmp_path / folder, resume_from_checkpoint="last", max_steps=1, **sft)
    assert steps(tmp_path / folder) == ["step-1"]
    written = yaml.safe_load((tmp_path / folder / "config.yaml").read_text())
    assert written["resume_from_checkpoint"] is None, "the file starts a run, and does not resume one"


def test_a_folder_that_is_no_run_is_left_alone(tmp_path, sft):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="no run to resume"):
        build(output_dir=str(tmp_path), resume_from_checkpoint="last", **sft)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_older_step_supersedes_the_later_ones(copy, whole, sft):
    """Rows and checkpoints that are made anew are moved; a torn line is, too."""
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    older = str(step(copy, 2))
    trainer = build(resume_from_checkpoint=older, **sft)
    assert trainer.session.folder == copy and trainer.session.step == 2
    aside = copy / "superseded-1"
    assert steps(copy) == ["step-1", "step-2"] and steps(aside) == ["step-3", "step-4"]
    assert [row["step"] for row in rows(copy)] == [1, 2]
    assert (aside / "metrics.jsonl").read_text().endswith('{"step": 5, "lo')
    assert len((aside / "metrics.jsonl").read_text().splitlines()) == 3
    assert (aside / "completed.json").is_file() and not (copy / "completed.json").exists()
    trainer.run()
    assert_same_run(whole, copy)
    assert not (copy / "superseded-2").exists()


def test_a_fork_leaves_the_run_as_it_was(copy, whole, sft, tmp_path):
    before = sorted(copy.rglob("*"))
    fork = run(tmp_path / "fork", resume_from_checkpoint=str(step(copy, 2)), **sft)
    assert sorted(copy.rglob("*")) == before
    assert_same_run(whole, fork)
    assert steps(fork) == ["step-3", "step-4"]


def test_a_checkpoint_alone_needs_a_folder_to_go_on_in(copy, whole, sft, tmp_path):
    alone = shutil.copytree(step(copy, 2), tmp_path / "backup" / "step-2")
    with pytest.raises(UserError, match="name a new --output_dir"):
        build(resume_from_checkpoint=str(alone), **sft)
    assert [path.name for path in (tmp_path / "backup").iterdir()] == ["step-2"]
    run(tmp_path / "new", resume_from_checkpoint=str(alone), **sft)
    assert rows(tmp_path / "new") == rows(whole)[2:]


def test_a_completed_run_says_so(copy, sft, caplog):
    report = (copy / "report.html").stat()
    with caplog.at_level(logging.INFO, "vtfast"):
        run(copy, resume_from_checkpoint="last", **sft)
    assert "already complete" in caplog.text and (copy / "report.html").stat() == report
    run(copy, resume_from_checkpoint="last", max_steps=5, **sft)
    assert [row["step"] for row in rows(copy)] == [1, 2, 3, 4, 5]


def test_a_run_at_home_goes_on(copy, sft, monkeypatch):
    """`~` in a flag or file that no shell has seen."""
    monkeypatch.setenv("HOME", str(copy.parent))
    trainer = build(output_dir=f"~/{copy.name}", resume_from_checkpoint="last", **sft)
    assert trainer.session.folder == copy


def test_a_run_that_was_killed_before_its_report_writes_it(copy, sft):
    for name in ("completed.json", "report.html"):
        (copy / name).unlink()
    run(copy, resume_from_checkpoint="last", **sft)
    assert (copy / "report.html").is_file() and len(rows(copy)) == 4


# Settings


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"freeze": "vision"}, "--freeze .*cannot change"),
        ({"use_peft": True}, "--use_peft .*cannot change"),
        ({"model": "random"}, "is not the model that the run of .* started from"),
    ],
)
def test_what_cannot_change(settings, message, copy, sft, random_path):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    if "model" in settings:
        settings = {"model": str(random_path)}
    with pytest.raises(UserError, match=message):
        build(output_dir=str(copy), resume_from_checkpoint="last", **sft | settings)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_what_changes_is_said(copy, sft, caplog):
    changes = {"learning_rate": 5e-4, "seed": 5, "per_device_train_batch_size": 2, "max_steps": 5}
    with caplog.at_level(logging.INFO, "vtfast"):
        trainer = build(resume_from_checkpoint=str(copy), **sft | changes)
    said = {record.getMessage(): record.levelname for record in caplog.records}
    assert said["--learning_rate: 0.0005, was 0.001 in step-4"] == "INFO"
    loud = [text for text, level in said.items() if level == "WARNING"]
    assert sum(text.startswith(("--seed: 5, was 0", "--per_device_train_batch_size: 2, was 3")) for text in loud) == 2
    assert any(text.startswith("2 prompts a step on 1 rank(s), were 3 on 1") for text in loud)
    (group,) = trainer.session.engine.optimizer.param_groups
    assert group["lr"] == pytest.approx(5e-4 / 3), "4 of 5 steps are done, 2 of them warm-up"


def test_the_settings_come_from_the_checkpoint(copy):
    flags = ["--resume_from_checkpoint", "last", "--output_dir", str(copy), "--max_steps", "7"]
    settings = read_settings(flags, SFTConfig, prog="", description="")
    assert (settings.max_steps, settings.warmup_steps, settings.recipe) == (7, 2, "tiny-spatial-sft")
    settings = read_settings(["--resume_from_checkpoint", str(copy)], SFTConfig, prog="", description="")
    assert settings.output_dir is None and settings.max_steps == 4, "the run goes on where it lies"
    settings = read_settings(["--recipe", "tiny-spatial", *flags[:4]], Config, prog="", description="")
    assert settings.max_steps == 120, "as given"


# Writing


def test_nothing_is_unpickled(copy, sft, monkeypatch):
    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("pickle"))
    build(output_dir=str(copy), resume_from_checkpoint="last", **sft)


def test_old_checkpoints_go_and_the_newest_stay(tmp_path, sft):
    run(tmp_path / "run", save_total_limit=2, **sft)
    assert steps(tmp_path / "run") == ["step-3", "step-4"]


def test_writing_beside_training_writes_the_same(tmp_path, whole, sft, monkeypatch):
    """The first checkpoint is still being written while the second step changes the weights."""
    second_step_done, write = threading.Event(), save.save_file

    def slow(*arguments, **options):
        assert second_step_done.wait(60)
        write(*arguments, **options)

    monkeypatch.setattr(save, "save_file", slow)
    trainer = build(output_dir=str(tmp_path / "run"), async_save=True, **sft)
    one_step = trainer.step

    def step_and_tell(number, asked):
        result = one_step(number, asked)
        if number == 2:
            assert steps(tmp_path / "run") == [".step-1.partial"]
            second_step_done.set()
        return result

    trainer.step = step_and_tell
    trainer.run()
    assert_same_run(whole, tmp_path / "run")
    for number in range(1, 5):
        assert unequal(weights(whole, number), weights(tmp_path / "run", number)) == []
        parts = (step(f, number) / "resume" / "rank-0.safetensors" for f in (whole, tmp_path / "run"))
        assert unequal(*map(load_file, parts)) == []
        assert files.find_damage(step(tmp_path / "run", number)) is None


def test_random_numbers_go_on():
    import random

    import numpy as np

    random.gauss(0, 1), np.random.standard_normal()  # each keeps a second number back
    state = rng_state()

    def draw():
        return (random.gauss(0, 1), np.random.standard_normal(), torch.rand(1).item(), random.random())

    first = draw()
    assert draw() != first
    set_rng_state(state)
    assert draw() == first


def test_tied_weights_are_copied_once():
    weight = torch.ones(2)
    copied = save.copies({"a": weight, "b": weight, "c": torch.ones(2)})
    assert copied["a"] is copied["b"] is not copied["c"]
    weight.zero_()
    assert copied["a"].sum() == 2
