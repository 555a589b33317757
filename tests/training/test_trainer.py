"""Short whole runs: what they leave behind, and that cutting the batch differently changes nothing."""

import json
import re
import subprocess
from types import SimpleNamespace

import pytest
import torch
import yaml
from launchers import ROOT, SHORT, assert_close_runs, deepspeed_launcher, environment, run
from make_files import mixed_rows
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

from vtfast.data.batches import batch_indices, batches
from vtfast.data.skip_log import SkipLog
from vtfast.model.loading import load_model

METRICS = [
    "step",
    "reward",
    "reward_std",
    "rewards/accuracy",
    "rewards/format",
    "frac_reward_zero_std",
    "completions/mean_length",
    "completions/clipped_ratio",
    "kl",
    "entropy",
    "loss",
    "grad_norm",
    "learning_rate",
    "clip_ratio/low",
    "clip_ratio/high",
    "sampler_drift",
    "time/rollout",
    "time/score",
    "time/update",
    "time/step",
    "tokens_per_second",
    "mfu",
    "memory_gb",
]


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """Three steps of 8 prompts with KL to the starting model, in one pass each."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    metrics = run(folder, "--per_device_train_batch_size", "8", "--beta", "0.04", "--save_steps", "2")
    return folder, metrics


def test_metrics_have_every_name_and_sane_values(short_run):
    _, metrics = short_run
    assert [line["step"] for line in metrics] == [1, 2, 3]
    for line in metrics:
        assert set(METRICS) <= set(line)
        assert 0 <= line["rewards/accuracy"] <= 1 and 0 <= line["rewards/format"] <= 1
        assert line["reward"] == pytest.approx(line["rewards/accuracy"] + line["rewards/format"])
        assert line["grad_norm"] > 0 and line["entropy"] > 0 and line["memory_gb"] > 0
        assert line["sampler_drift"] < 1e-5, "the sampler and the trainer must agree on log-probs"
        assert line["time/rollout"] + line["time/score"] + line["time/update"] <= line["time/step"]
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6) and metrics[2]["kl"] > 0
    assert metrics[0]["learning_rate"] == 0 and metrics[1]["learning_rate"] > 0


def test_the_run_folder(short_run):
    folder, metrics = short_run
    assert yaml.safe_load((folder / "config.yaml").read_text())["beta"] == 0.04
    rows = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * 8 * 4
    first = [row for row in rows if row["step"] == 1]
    assert sum(row["reward"] for row in first) / len(first) == pytest.approx(metrics[0]["reward"])
    assert all(row["completion"].startswith("<think>") for row in rows)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").iterdir())
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    assert json.loads((folder / "held_out.json").read_text())["after"]["count"] > 0
    table = (folder.parent / "one.out").read_text()
    assert "held-out accuracy: 0." in table and "held-out format: 0." in table and "distance" in table


def test_checkpoints_are_hugging_face_folders(short_run, base_path):
    folder, _ = short_run
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-2", "step-3"]
    last = folder / "checkpoints" / "step-3"
    model = Qwen2VLForConditionalGeneration.from_pretrained(last)
    tokenizer = AutoTokenizer.from_pretrained(last)
    base = load_file(base_path / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    changed = [name for name, value in load_file(last / "model.safetensors").items() if not value.equal(base[name])]
    assert len(changed) == len(base), "every weight is trained"
    assert tokenizer.decode(tokenizer.encode("Is it left?")) == "Is it left?"


@pytest.mark.slow  # test_step.py cuts batches in the fast tests
def test_accumulation_changes_nothing(short_run, tmp_path):
    """8 prompts as 2 x 4, in rows of at most 300 tokens, are the same step as in one row."""
    flags = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"]
    metrics = run(tmp_path / "four", *flags, "--beta", "0.04", "--token_budget", "300")
    assert metrics[0]["passes"] > 2 and short_run[1][0]["passes"] == 1
    assert_close_runs(short_run[0], tmp_path / "four")


def test_two_ranks_equal_one(short_run, tmp_path):
    """DeepSpeed's launcher, two gloo ranks, ZeRO-2: the same global batch gives the same weights."""
    run(tmp_path / "two", "--per_device_train_batch_size", "4", "--beta", "0.04", launcher=deepspeed_launcher())
    assert_close_runs(short_run[0], tmp_path / "two")


@pytest.mark.slow
def test_two_ranks_with_different_amounts_of_work(tmp_path):
    """Prompts of very different lengths, some without an image, several passes, passes in which one rank has nothing:
    still the same weights."""
    data = mixed_rows(tmp_path / "mixed.parquet")
    flags = [
        "--data",
        str(data),
        "--eval_data",
        "none",
        "--reward_funcs",
        "length",
        "--token_budget",
        "160",
        "--adam_epsilon",  # with a smaller one, Adam scales a gradient that is only rounding up to a whole step
        "1e-4",
        "--warmup_steps",
        "0",
    ]
    one = run(tmp_path / "one", *flags, "--per_device_train_batch_size", "6")
    two = run(tmp_path / "two", *flags, "--per_device_train_batch_size", "3", launcher=deepspeed_launcher())
    assert all(line["grad_norm"] > 0 for line in one)
    assert any(line["passes"] > 1 for line in two) and one[0]["passes"] > two[0]["passes"]
    assert_close_runs(tmp_path / "one", tmp_path / "two")


def test_bf16_with_fp32_accumulation(tmp_path):
    """The path of the GPU, on the CPU: bf16 weights, fp32 masters and gradient sums, several passes a step."""
    flags = ["--dtype", "bfloat16", "--per_device_train_batch_size", "4", "--token_budget", "150"]
    metrics = run(tmp_path / "bf16", *flags, "--eval_data", "none", "--gradient_checkpointing", "true")
    assert all(line["passes"] > 1 and line["grad_norm"] > 0 for line in metrics)
    saved = load_file(tmp_path / "bf16" / "checkpoints" / "step-3" / "model.safetensors")
    assert all(value.dtype == torch.bfloat16 and value.isfinite().all() for value in saved.values())


def test_lora_and_an_offloaded_reference(tmp_path, base_path):
    flags = ["--beta", "0.04", "--eval_data", "none", "--num_iterations", "2", "--max_steps", "4"]
    lora = run(tmp_path / "lora", *flags, "--use_peft", "true", "--lora_r", "2")
    away = run(tmp_path / "away", *flags, "--offload_reference", "true", "--freeze", "vision")
    for metrics in (lora, away):
        assert [line["step"] for line in metrics] == [1, 2, 3, 4]
        assert metrics[0]["reward"] == metrics[1]["reward"] and metrics[1]["time/rollout"] < 1e-3
        assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6) and metrics[3]["kl"] > 0
    rows = (tmp_path / "lora" / "completions.jsonl").read_text().splitlines()
    assert {json.loads(row)["step"] for row in rows} == {1, 3}
    saved = tmp_path / "lora" / "checkpoints" / "step-4"
    assert (saved / "adapter_model.safetensors").is_file() and (saved / "tokenizer.json").is_file()
    merged = load_model(saved)
    base = load_model(base_path)
    moved = merged.language_model.layers[0].self_attn.q_proj.weight
    assert not moved.equal(base.language_model.layers[0].self_attn.q_proj.weight)
    assert merged.head.equal(base.head)


def test_iterations_skip_no_data():
    """Rollouts count the data, and not the optimizer steps that live on them."""
    builder = SimpleNamespace(build=lambda sample, index: index)
    seen = batches(builder, SkipLog(), list(range(10)), range(1, 11, 2), per_rank=2, steps_per_batch=2)
    assert sorted(i for step in seen for i in step) == list(range(10))


def test_an_error_of_one_rank_is_everyones(tmp_path):
    """A sample that only rank 1 finds fault with stops both with a line that names it."""
    script = tmp_path / "one_bad.py"
    script.write_text(
        "import sys\n"
        "from torch import distributed\n"
        "from vtfast.training import setup\n"
        "check = setup.check_group\n"
        "def planted(prompt, tokens, *rest):\n"
        "    if tokens and distributed.get_rank() == 1:\n"
        "        raise setup.UserError('planted')\n"
        "    check(prompt, tokens, *rest)\n"
        "setup.check_group = planted\n"
        "from vtfast.cli import main\n"
        "sys.exit(main(['train', *sys.argv[1:]]))\n"
    )
    flags = [*SHORT, "--per_device_train_batch_size", "2", "--eval_data", "none"]
    command = [*deepspeed_launcher(), str(script), *flags, "--on_bad_sample", "error"]
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "run")], capture_output=True, text=True, env=environment(), cwd=ROOT
    )
    assert done.returncode != 0
    # told by the rank that fails, or by the one that hears of it first
    failed = (
        r"error: (rank 1 \(.*\) failed in step 1, rollout: )?step 1, .*\.parquet, row \d+ \(counted from 0\): planted"
    )
    assert re.search(failed, done.stdout + done.stderr)
    assert "planted" in (tmp_path / "run" / "skipped.jsonl").read_text()


def test_order_visits_everything_once_an_epoch():
    seen = [i for step in range(1, 8) for i in batch_indices(10, step, 4, seed=1)]
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10)) and seen[:10] != seen[10:20]
    assert batch_indices(10, 3, 4, seed=1) == seen[8:12] and batch_indices(10, 3, 4, seed=2) != seen[8:12]
