"""`--dry-run`: settings, an estimate, and advice that fits."""

import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from model_2b import changed, drawn_2b, memory, model_2b

from vtfast.cli.dry_run import count_rows
from vtfast.cli.main import main
from vtfast.config import load_config
from vtfast.cost.verdict import Device, advice, find_device
from vtfast.utils.errors import UserError


@pytest.mark.parametrize("gigabytes", [16, 20, 24, 32])
@pytest.mark.parametrize("beta", [0, 0.04])
def test_advice_fits(gigabytes, beta):
    """Whatever it says, with it the estimate says yes; and a larger token budget would not do."""
    config = changed(beta=beta, freeze="vision")
    device = Device("cuda", int(gigabytes * 1e9), "a GPU")
    assert memory(config, gigabytes=gigabytes).peak > device.bytes
    words = advice(drawn_2b(("vision",)), config, device, ranks=4).split()
    ranks = int(words[1]) if words[2:3] == ["ranks"] else 4
    flags = [word for word in words if word not in ("try", "ranks", "with", words[1])] if ranks != 4 else words[1:]
    heeded = {name.removeprefix("--"): value for name, value in zip(flags[::2], flags[1::2], strict=True)}
    values = {key: int(value) if value.isdecimal() else value == "true" for key, value in heeded.items()}
    fixed = config.model_copy(update=values)
    assert memory(fixed, ranks, gigabytes).peak <= device.bytes
    if list(heeded) == ["token_budget"]:
        larger = config.model_copy(update={"token_budget": fixed.token_budget * 11 // 10})
        assert memory(larger, gigabytes=gigabytes).peak > device.bytes


@pytest.fixture
def folder_2b(tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)  # a library that has trained in this process may leave it
    (tmp_path / "2b").mkdir()
    model_2b().save_pretrained(tmp_path / "2b")  # config.json alone
    return str(tmp_path / "2b")


def outlook(capsys, *flags: str) -> tuple[dict, list[str]]:
    assert main(["train", "--dry-run", *flags]) == 0
    out = capsys.readouterr().out
    return yaml.safe_load(out), [line for line in out.splitlines() if line.startswith("#")]


def test_a_dry_run_prints_settings_and_an_estimate(capsys, folder_2b):
    flags = ["--recipe", "visualthinker-2b-sat", "--model", folder_2b]
    config, lines = outlook(capsys, *flags, "--gpu_memory_gb", "h100")
    assert config["model"] == folder_2b and len(lines) < 40
    text = "\n".join(lines)
    for expected in (
        "4 rank(s) on H100 of 80 GB, in bfloat16",
        "together                         2,209.0 M 2,209.0 M",
        "fits: yes",
        "8 prompts a step with 8 completions each: up to 52,992 tokens",
        "rows of array/SAT: unknown",
        "would stop here: --model: cannot read the tokenizer",
    ):
        assert expected in text
    _, lines = outlook(capsys, *flags, "--gpu_memory_gb", "10")
    assert any(line.startswith("# fits: no, ") for line in lines)
    peak = float(next(line for line in lines if line.startswith("# peak")).split()[-2])
    _, lines = outlook(capsys, *flags, "--gpu_memory_gb", str(peak * 1.05), "--num_processes", "4")
    assert any(line.startswith("# fits: tight, ") for line in lines)


def test_disk_that_is_too_small_for_the_checkpoints(capsys, folder_2b, tmp_path, monkeypatch):
    """A checkpoint of 2B is 4.4 GB of weights and 12 bytes of optimizer for each of 2.2 billion."""
    flags = ["--model", folder_2b, "--dtype", "bfloat16", "--output_dir", str(tmp_path / "a" / "b")]
    flags += ["--max_steps", "1500", "--save_steps", "100"]

    def disk(free, *more):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        (line,) = (x for x in outlook(capsys, *flags, *more)[1] if x.startswith("# disk: "))
        return line

    assert disk(5e11) == "# disk: a checkpoint takes 30.93 GB, 15 of them 464 GB; 500 GB are free"
    assert disk(4e11).endswith("; 400 GB are free: not enough; --save_total_limit keeps fewer")
    assert "3 of them 92.78 GB" in disk(1e11, "--save_total_limit", "2")
    assert "1 of them" in disk(1e11, "--save_steps", "0")
    assert disk(1e11, "--use_peft", "true").startswith("# disk: a checkpoint takes 0.")


def test_ranks_are_the_launchers(capsys, folder_2b, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "16")
    _, lines = outlook(capsys, "--model", folder_2b, "--gpu_memory_gb", "80", "--num_processes", "2")
    assert "each of 16 rank(s)" in lines[1]


def test_a_model_out_of_reach_leaves_the_rest(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config, lines = outlook(capsys, "--model", "nobody/no-such-model", "--warmup_steps", "500")
    text = "\n".join(lines)
    assert config["model"] == "nobody/no-such-model" and text.count("nobody/no-such-model is no local path") == 1
    assert "No estimate of the memory: " in text and "an epoch of at most 2,048 rows is 128 steps" in text
    assert "warning: --warmup_steps 500" in text


def test_the_gpu_that_there_is(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60_000, 80_000))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    assert find_device(load_config()) == Device("cuda", 60_000, "a card, 75% of it free")
    assert find_device(load_config(overrides={"device": "cpu"})).kind == "cpu"
    assert find_device(load_config(), "A100-40") == Device("cuda", 40 * 10**9, "A100-40 of 40 GB")
    assert main(["train", "--gpu_memory_gb", "80"]) == 2, "it says nothing without --dry-run"
    assert main(["train", "--dry-run", "--gpu_memory_gb", "X100"]) == 2
    assert capsys.readouterr().out == "", "no settings file of a refused command"


@pytest.mark.parametrize("size", ["much", "-1", "nan", "inf", "0", "H1000"])
def test_a_gpu_that_there_is_not(size):
    with pytest.raises(UserError, match=f"--gpu_memory_gb {size}: must be a number or one of L4"):
        find_device(load_config(), size)


def test_rows_are_counted_where_that_is_cheap(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"question": ["a", "b", "c"]}), tmp_path / "train.parquet")
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n')
    (tmp_path / "rows.json").write_text("[]")
    (tmp_path / "bad.parquet").write_text("no")

    def count(name, **more):
        return count_rows(load_config(overrides={"data": tmp_path / name} | more))

    assert (count("train.parquet"), count("rows.jsonl")) == (3, 2)
    assert count("train.parquet", first_n=2) == 2 and count("train.parquet", first_rows=1) == 1
    assert count("rows.json") is count("bad.parquet") is count("gone.parquet") is None
    assert count_rows(load_config()) == 2048
