"""Supervised fine-tuning: the loss is Hugging Face's, the steps are AdamW's, and cutting the work changes neither."""

import itertools
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from hugging_face import padded, plain
from launchers import deepspeed_launcher, environment
from make_files import mixed_rows
from make_trainer import assert_same, state
from safetensors.torch import load_file
from transformers import Qwen2VLForConditionalGeneration

from vtfast.cli.main import main
from vtfast.config import SFTConfig, field_help, field_names, load_config, recipe_names
from vtfast.cost.flops import forward_flops
from vtfast.data import Processor, Sample, synthetic
from vtfast.data.batches import batches
from vtfast.data.prompt_builder import EncodedSample
from vtfast.distributed.ranks import Ranks
from vtfast.model.loading import load_model
from vtfast.rollout import Completion
from vtfast.trainer import Trainer
from vtfast.training import loop
from vtfast.training.groups import Group, MicroBatch
from vtfast.training.load_balancing import balance
from vtfast.training.metrics import update_flops
from vtfast.training.sft import SFTObjective, SFTTrainer
from vtfast.utils.errors import UserError

VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
ANSWERS = [[5, 6, 7], [300], [17, 388], [9, 8, 7, 6, 5, 4, 3, 2]]
# Adam's first step is the gradient's sign, even where the gradient is nothing but rounding. With this epsilon it is
# the gradient itself.
PROPORTIONAL = {"adam_epsilon": 1.0, "learning_rate": 0.1, "max_grad_norm": 0.5}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("spatial")
    synthetic.write_dataset(folder, train=48, val=8, seed=0)
    return folder


@pytest.fixture
def make(tmp_path, data):
    """(trainer, 8 questions) of the embedded default with little data and some settings changed."""
    made = itertools.count()

    def build(**overrides):
        few = {
            "data": data / "train.parquet",
            "eval_data": data / "val.parquet",
            "warmup_steps": 0,
            "max_steps": 3,
            "per_device_train_batch_size": 8,
            "output_dir": tmp_path / f"run-{next(made)}",
        }
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in (few | overrides).items()}
        trainer = SFTTrainer(load_config(overrides=settings, kind=SFTConfig))
        return trainer, next(questions(trainer))

    return build


def questions(trainer, steps=(1,)):
    return batches(
        trainer.session.prompt_builder, trainer.session.skip_log, trainer.session.train_samples, steps, per_rank=8
    )


def weights(trainer):
    return {name: value.clone() for name, value in trainer.session.policy.module.named_parameters()}


def assert_close(weights, expected, atol=2e-6):
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=atol, msg=name)


def labelled(batch, processor, prompts, answers, completion_only):
    """Labels as the original's collator makes them, or of the answers alone; -100 elsewhere."""
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    if not completion_only:
        marks = torch.tensor(processor.tokenizer.convert_tokens_to_ids(VISION))
        return labels.masked_fill(torch.isin(batch["input_ids"], marks), -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        labels[row, : len(prompt.ids)] = -100
        assert (labels[row] >= 0).sum() == len(answer)
    return labels


def given(prompt, tokens):
    question = EncodedSample(Sample("?", ["a"], "a", []), prompt)
    return Group(question, [Completion(list(tokens), [], "stop")], advantage=torch.ones(1))


def one_micro_batch(policy, groups) -> MicroBatch:
    (batch,) = balance(groups, Ranks(0, 1, policy.device), policy, None, 10**6, False).micro_batches
    return batch


def not_text(processor, completion_only):
    ids = processor.tokenizer.convert_tokens_to_ids(VISION)
    return None if completion_only else torch.tensor(ids)


@pytest.mark.parametrize("completion_only", [True, False])
def test_loss_and_gradients_are_hugging_faces(policy, processor, prompts, completion_only):
    """One image, two images, text alone; the mean over the targets of a padded batch, as `labels` gives it."""
    batch = padded(prompts, ANSWERS)
    labels = labelled(batch, processor, prompts, ANSWERS, completion_only)
    num_targets = int((labels[:, 1:] >= 0).sum())
    named = dict(policy.module.named_parameters())
    with plain(policy) as module:
        out = module(**batch, labels=labels)
        expected = torch.autograd.grad(out.loss, list(named.values()))
    kept = labels[:, 1:] >= 0
    logits = out.logits[:, :-1][kept]
    correct = (logits.argmax(-1) == labels[:, 1:][kept]).sum()
    entropy = torch.distributions.Categorical(logits=logits).entropy().sum()

    objective = SFTObjective(policy, not_text(processor, completion_only))
    groups = [given(*pair) for pair in zip(prompts, ANSWERS, strict=True)]
    loss, sums = objective(one_micro_batch(policy, groups), num_targets)
    gradients = torch.autograd.grad(loss, list(named.values()))
    assert float(loss.detach()) == pytest.approx(float(out.loss.detach()), abs=1e-5)
    assert sums.tolist() == pytest.approx([float(correct), float(entropy.detach())], rel=1e-5)
    for name, gradient, other in zip(named, gradients, expected, strict=True):
        error = (gradient - other).norm() / other.norm().clamp(min=1e-7)
        assert error < 1e-4, name


@pytest.mark.parametrize("completion_only", [True, False])
def test_three_steps_are_adamws_on_padded_batches(make, completion_only, base_path):
    """Clipping, weight decay and the schedule included."""
    settings = {**PROPORTIONAL, "weight_decay": 0.1, "token_budget": 300}
    trainer, _ = make(completion_only_loss=completion_only, **settings)
    other = load_model(base_path)
    module = other.module
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, eps=1.0, weight_decay=0.1)
    for step, asked in enumerate(questions(trainer, range(1, 4)), 1):
        metrics, _ = trainer.step(step, asked)
        assert metrics["passes"] > 1
        prompts = [question.prompt for question in asked]
        # written out here: `</think><answer>…</answer>` and the tokenizer's end mark
        texts = [f"</think><answer>{question.sample.answer}</answer>" for question in asked]
        answers = [[*trainer.session.processor.tokenizer(text)["input_ids"], 386] for text in texts]
        batch = padded(prompts, answers)
        labels = labelled(batch, trainer.session.processor, prompts, answers, completion_only)
        with plain(other):
            loss = module(**batch, labels=labels).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = rate = 0.1 * (4 - step) / 3
        optimizer.step()
        optimizer.zero_grad()
        assert metrics["loss"] == pytest.approx(float(loss.detach()), abs=1e-5)
        assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
        assert metrics["learning_rate"] == pytest.approx(rate)
        assert metrics["num_targets"] == (labels[:, 1:] >= 0).sum()
        assert metrics["num_tokens"] == batch["attention_mask"].sum()
    assert_close(weights(trainer), dict(module.named_parameters()), atol=1e-5)
    start = dict(load_model(base_path).module.named_parameters())
    assert any(not value.allclose(start[name], atol=1e-3) for name, value in weights(trainer).items())


@pytest.mark.parametrize("completion_only", [True, False])
def test_cutting_the_batch_changes_nothing(make, completion_only):
    results = []
    for budget in (None, 150, 10):  # one row; rows of two; every sample, longer than the budget, alone
        trainer, asked = make(token_budget=budget, completion_only_loss=completion_only, **PROPORTIONAL)
        metrics, _ = trainer.step(1, asked)
        results.append((metrics, weights(trainer)))
    (whole, expected), *cut = results
    assert [metrics["passes"] for metrics, _ in results][::2] == [1, 8]
    for metrics, after in cut:
        for key in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_targets"):
            assert metrics[key] == pytest.approx(whole[key], rel=1e-5), key
        assert_close(after, expected)


def logged(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_ranks_equal_one(tmp_path):
    """Prompts of very different lengths, a pass in which one rank has nothing: the same weights."""
    rows = str(mixed_rows(tmp_path / "mixed.parquet"))
    settings = itertools.chain(*((f"--{name}", str(value)) for name, value in PROPORTIONAL.items()))
    flags = [
        "sft",
        "--data",
        rows,
        "--eval_data",
        "none",
        "--max_steps",
        "2",
        "--warmup_steps",
        "0",
        "--completion_only_loss",
        "false",
        "--token_budget",
        "160",
        *settings,
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*flags, "--per_device_train_batch_size", "6", "--output_dir", str(one)]) == 0
    launched = [
        *deepspeed_launcher(),
        "--module",
        "vtfast",
        *flags,
        "--per_device_train_batch_size",
        "3",
        "--output_dir",
        str(two),
    ]
    done = subprocess.run(launched, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    assert logged(one)[0]["passes"] > logged(two)[0]["passes"] > 1
    for left, right in zip(logged(one), logged(two), strict=True):
        for key in ("loss", "grad_norm", "mean_token_accuracy", "num_tokens", "num_targets"):
            assert left[key] == pytest.approx(right[key], rel=1e-5), key
    saved = [load_file(folder / "checkpoints" / "step-2" / "model.safetensors") for folder in (one, two)]
    assert_close(*saved)


@pytest.mark.parametrize("settings", [{}, {"completion_only_loss": False}, {"freeze": "vision"}, {"use_peft": True}])
def test_a_rank_with_nothing_to_do_reduces_zeros(make, settings):
    """Every trained weight gets a gradient of zero, in the order in which other ranks get theirs."""
    trainer, asked = make(**settings)
    objective = SFTObjective(trainer.session.policy, trainer.not_text)  # without DeepSpeed's hooks
    trained = {n: p for n, p in objective.named_parameters() if p.requires_grad}
    arrived, orders = [], []
    for name, parameter in trained.items():
        parameter.register_hook(lambda _, name=name: arrived.append(name))
    batch = one_micro_batch(trainer.session.policy, trainer.with_targets(asked, 1))
    for case in (batch, MicroBatch([], {}, trainer.session.policy)):
        arrived.clear()
        loss, sums = objective(case, 99)
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=False)
        orders.append(list(arrived))
    assert loss.item() == 0 and not sums.any()
    assert not any(gradient.any() for gradient in gradients)
    assert orders[0] == orders[1] and set(orders[0]) == set(trained)


def test_frozen_parts_do_not_move(make):
    trainer, asked = make(freeze="vision,embeddings", weight_decay=0.1)
    before = weights(trainer)
    trainer.step(1, asked)
    for name, value in weights(trainer).items():
        frozen = any(part in name for part in ("visual.blocks", "patch_embed", "embed_tokens"))
        assert value.equal(before[name]) == frozen, name


def test_checkpointing_changes_nothing(make):
    results = []
    for checkpointing in (False, True):
        trainer, asked = make(gradient_checkpointing=checkpointing, **PROPORTIONAL)
        layer, calls = trainer.session.policy.language_model.layers[0].mlp, []
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        metrics, _ = trainer.step(1, asked)
        results.append((len(calls), metrics["loss"], weights(trainer)))
    (once, loss, plain_weights), (twice, same, after) = results
    assert (once, twice) == (1, 2) and same == pytest.approx(loss, rel=1e-6)
    assert_close(after, plain_weights)


# ------------------------------------------------------------------------------------------ targets


@pytest.mark.parametrize(
    ("template", "target", "text"),
    [
        ("brief", "<think></think><answer>{answer}</answer>", "</think><answer>left</answer><|endoftext|>"),
        ("instruct", "{answer}", "left<|im_end|>"),
        ("instruct", "<think></think> {answer}", "<think></think> left<|im_end|>"),
        ("sft", "{answer}<|im_end|>\n", "left<|im_end|>\n"),
        ("brief", "</think>{answer}<|endoftext|>", "</think>left<|endoftext|>"),
    ],
)
def test_targets(make, template, target, text):
    """A `<think>` that the prompt has written is not repeated, and exactly one end mark follows."""
    trainer, _ = make(template=template, target=target)
    sample = Sample("Is it left or right?", ["left", "right"], "left", [])
    tokens = trainer.target.tokens(sample)
    assert trainer.session.processor.decode(tokens, keep_special=True) == text


def test_a_target_from_a_file(make, tmp_path):
    (tmp_path / "mine.txt").write_bytes(b"</think>\r\nIt is {answer}.\n")
    trainer, _ = make(target=tmp_path / "mine.txt")
    tokens = trainer.target.tokens(Sample("?", [], "{answer} 12 cm", []))
    assert trainer.session.processor.decode(tokens) == "</think>\nIt is {answer} 12 cm."


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "left"}, r"--target left: has no \{answer\}"),
        ({"target": "{answer}"}, "the target does not close it"),
        ({"target": "gone.txt"}, "--target: gone.txt: no such file"),
        ({"num_train_epochs": 0}, "--num_train_epochs 0.0: must be above 0"),
        ({"max_steps": 0}, "--max_steps 0: must be at least 1"),
        ({"beta": 0.1}, "--beta: unknown"),
    ],
)
def test_a_mistake_is_named_and_leaves_nothing(make, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        make(**settings)
    assert not list(tmp_path.iterdir())


def test_open_questions_and_text_alone_are_trained_on(make):
    trainer, _ = make()
    asked = [
        trainer.session.prompt_builder.build(Sample("How long is it?", [], "12 cm", []), 0),
        trainer.session.prompt_builder.build(Sample("Is it left?", ["yes", "no"], "no", []), 1),
    ]
    metrics, _ = trainer.step(1, asked)
    assert metrics["loss"] > 0 and metrics["grad_norm"] > 0 and metrics["skipped_samples"] == 0
    tokens = [[*trainer.target.tokens(question.sample)] for question in asked]
    assert metrics["num_targets"] == sum(map(len, tokens))


def usable(trainer, samples):
    return trainer.session.skip_log.drop_invalid(samples, "train.parquet", trainer.target_problem)


def test_a_target_that_is_too_long_is_told_before_the_first_step(make):
    trainer, asked = make(max_completion_length=20)
    samples = [question.sample for question in asked]
    samples[2].answer = "left " * 30
    assert usable(trainer, samples) == [s for i, s in enumerate(samples) if i != 2]
    (listed,) = trainer.session.skip_log.pop()
    assert (listed["step"], listed["row"]) == (0, samples[2].row)
    assert "--max_completion_length is 20" in listed["reason"]
    with pytest.raises(UserError, match=r"none of its 1 samples can be used; train\.parquet, row .* is 20"):
        usable(trainer, samples[2:3])
    trainer.session.skip_log.is_strict = True
    with pytest.raises(UserError, match=r"row \d+ .*: the target has .*--max_completion_length is 20"):
        usable(trainer, samples)


def test_overlong_targets_stop_no_run(make):
    with pytest.raises(UserError, match=r"none of its 48 samples can be used; train\.parquet, row 0 .*: the target"):
        make(max_completion_length=1)


def test_steps_without_a_usable_sample_are_left_out(make):
    """As GRPO's are: nothing moves, they are counted and listed, and several in a row stop the run."""
    trainer, _ = make(max_steps=9)
    steps = questions(trainer, range(1, 7))
    trainer.step(1, next(steps))
    before, limit = state(trainer), trainer.config.max_prompt_length
    trainer.config.max_prompt_length = 5
    metrics, rows = trainer.step(2, next(steps))
    assert rows == [] and metrics["skipped_samples"] == 8 and metrics["num_targets"] == 0
    assert metrics["loss"] is metrics["entropy"] is metrics["mean_token_accuracy"] is None
    assert (metrics["empty_steps"], metrics["step_left_out"]) == (1, 1)
    assert math.isnan(metrics["grad_norm"]) and metrics["learning_rate"] == before[1][0]
    assert trainer.summary(metrics) == "no sample could be used"
    assert_same(before, state(trainer))
    listed = [json.loads(x) for x in (trainer.session.folder / "skipped.jsonl").read_text().splitlines()]
    assert [(row["step"], "the limit is 5" in row["reason"]) for row in listed] == [(2, True)] * 8

    trainer.config.max_prompt_length = limit
    metrics, _ = trainer.step(3, next(steps))
    assert metrics["loss"] > 0 and (metrics["empty_steps"], metrics["step_left_out"]) == (1, 0)
    trainer.config.max_prompt_length = 5
    trainer.step(4, next(steps))
    trainer.step(5, next(steps))
    with pytest.raises(UserError, match=r"see skipped\.jsonl; 3 steps in a row"):
        trainer.step(6, next(steps))
    left_out = (trainer.session.folder / "nonfinite.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in left_out] == ["empty"] * 4


def test_a_run_with_an_empty_step_goes_on_to_its_end(make):
    trainer, _ = make(max_steps=2, eval_data="none")
    one_step = trainer.step
    trainer.step = lambda number, asked: one_step(number, asked if number == 2 else [])
    trainer.run()
    assert [line["loss"] is None for line in logged(trainer.session.folder)] == [True, False]
    assert (trainer.session.folder / "curves.png").is_file()


def test_a_bare_answer_is_graded_as_the_answer(make):
    bare, _ = make(template="sft", target="{answer}")
    assert bare.completion_for_rewards("left") == "<think></think><answer>left</answer>"
    assert bare.completion_for_rewards("so <answer>left</answer>") == "so <answer>left</answer>"
    tagged, _ = make()
    assert tagged.completion_for_rewards("left") == "left"
    bare.completion_for_rewards = lambda response: "<think></think><answer>nothing</answer>"
    judged = loop.evaluate(bare)
    assert (judged.accuracy("greedy"), judged.format("greedy")) == (0, 1)


def test_a_new_end_mark_ends_answers_from_now_on(make, base_path, tmp_path):
    """A base model whose answers end with <|endoftext|> alone learns a chat's <|im_end|>."""
    shutil.copytree(base_path, tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": 386}')
    trainer, _ = make(model=tmp_path / "base")
    assert trainer.session.policy.eos_ids == (386,)
    trainer, _ = make(model=tmp_path / "base", template="sft", target="{answer}")
    assert trainer.session.policy.eos_ids == (386, 388)
    trainer.session.step = 1
    loop.save(trainer.session, tracker=None)
    saved = trainer.session.folder / "checkpoints" / "step-1"
    assert load_model(saved).eos_ids == (386, 388)
    assert Processor.from_pretrained(saved).eos_ids == [386, 388] == trainer.session.processor.eos_ids


def test_passes_over_the_data_become_steps(make):
    """48 samples, 8 a step."""
    for epochs, steps in ((1, 6), (0.1, 1), (1.01, 7), (0.55, 4)):
        assert make(max_steps="none", num_train_epochs=epochs)[0].config.max_steps == steps
    some = {"first_n": 25, "per_device_train_batch_size": 1, "max_steps": "none"}
    trainer, _ = make(**some, num_train_epochs=2.2)
    assert 2.2 * 25 > 55 and trainer.config.max_steps == 55  # floats are not exact
    assert make(max_steps=5, num_train_epochs=9)[0].config.max_steps == 5


def test_bf16_is_the_same_step_but_for_rounding(make):
    """The path of the GPU, on the CPU: several passes, fp32 masters and gradient sums."""
    settings = {"token_budget": 150, "completion_only_loss": False}
    (exact, asked), (rounded, _) = make(**settings), make(dtype="bfloat16", **settings)
    (one, _), (other, _) = exact.step(1, asked), rounded.step(1, asked)
    assert one["passes"] > 1 and other["loss"] == pytest.approx(one["loss"], rel=0.02)
    assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.1)


def test_useful_operations(make, monkeypatch):
    """Targets in the prompt meet the head; a frozen tower runs forward once."""
    trainer, asked = make()
    batch = one_micro_batch(trainer.session.policy, trainer.with_targets(asked, 1))
    base = update_flops(trainer.session.policy, [batch], vision_cached=False)
    more = update_flops(trainer.session.policy, [batch], prompt_targets=5, vision_cached=False)
    assert more - base == pytest.approx(3 * 5 * 2 * 96 * 400)  # D = 96, V = 400
    frozen, _ = make(freeze="vision")
    tower = sum(
        forward_flops(frozen.session.policy.module.config, 0, [], q.prompt.grid.prod(-1).tolist()).vision for q in asked
    )
    assert base - update_flops(frozen.session.policy, [batch], vision_cached=False) == pytest.approx(2 * tower)
    assert base - update_flops(frozen.session.policy, [batch]) == pytest.approx(3 * tower)
    monkeypatch.setattr("vtfast.training.metrics.mfu", lambda flops, *_: flops)
    assert trainer.step(1, asked)[0]["mfu"] == pytest.approx(base)
    assert frozen.step(1, asked)[0]["mfu"] == pytest.approx(base - 2 * tower)
    whole, _ = make(completion_only_loss=False)
    metrics, _ = whole.step(1, asked)
    prompts = metrics["num_targets"] - sum(batch.pack.lengths)
    assert metrics["mfu"] == pytest.approx(base + prompts * 3 * 2 * 96 * 400)


# ------------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    """A run of one epoch and a half, 48 samples, 16 a step."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    flags = [
        "--data",
        str(data / "train.parquet"),
        "--eval_data",
        str(data / "val.parquet"),
        "--per_device_train_batch_size",
        "8",
        "--gradient_accumulation_steps",
        "2",
        "--num_train_epochs",
        "1.5",
        "--save_steps",
        "2",
        "--output_dir",
        str(folder),
    ]
    assert main(["sft", *flags]) == 0
    return folder


def test_the_run_folder(finished):
    metrics = logged(finished)
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5]  # 72 / 16, rounded up
    names = {
        "loss",
        "learning_rate",
        "grad_norm",
        "num_tokens",
        "mean_token_accuracy",
        "entropy",
        "epoch",
        "mfu",
        "tokens_per_second",
        "time/data",
        "time/pack",
        "time/update",
        "time/step",
        "memory_gb",
    }
    assert all(names <= set(line) for line in metrics)
    assert [line["epoch"] for line in metrics] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3])
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    settings = yaml.safe_load((finished / "config.yaml").read_text())
    assert settings["max_steps"] == 5 and list(settings) == list(field_names(SFTConfig))
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((finished / "tensorboard").iterdir())
    saved = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert saved == ["step-2", "step-4", "step-5"]


def test_a_checkpoint_loads_and_grpo_goes_on_from_it(finished, base_path, tmp_path, data):
    last = finished / "checkpoints" / "step-5"
    module = Qwen2VLForConditionalGeneration.from_pretrained(last)
    base = load_file(base_path / "model.safetensors")
    moved = [n for n, value in load_file(last / "model.safetensors").items() if not value.equal(base[n])]
    assert len(moved) == len(base)
    settings = {
        "model": str(last),
        "data": str(data / "train.parquet"),
        "eval_data": "none",
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "output_dir": str(tmp_path / "grpo"),
    }
    trainer = Trainer(load_config(overrides=settings))
    assert trainer.session.policy.head.equal(module.lm_head.weight)
    trainer.run()
    assert logged(tmp_path / "grpo")[0]["reward"] >= 0


def test_lora_saves_adapters(make, base_path):
    trainer, asked = make(use_peft=True, lora_r=2)
    trainer.step(1, asked)
    trainer.session.step = 1
    loop.save(trainer.session, tracker=None)
    folder = trainer.session.folder / "checkpoints" / "step-1"
    assert (folder / "adapter_model.safetensors").is_file()
    moved, base = load_model(folder), load_model(base_path)
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert not moved.module.get_parameter(name).equal(base.module.get_parameter(name))


def test_a_batch_is_learned_by_heart(make):
    trainer, asked = make(max_steps=30, lr_scheduler_type="constant")
    metrics = [trainer.step(step, asked)[0] for step in range(1, 31)]
    assert metrics[0]["loss"] > 1 and metrics[-1]["loss"] < 0.05
    assert metrics[-1]["mean_token_accuracy"] == 1 > metrics[0]["mean_token_accuracy"]


@pytest.mark.slow
def test_answers_are_learned(tmp_path, capsys):
    """The recipe: three passes over 2,048 questions help with 400 others."""
    config = load_config(overrides={"output_dir": str(tmp_path / "run")}, kind=SFTConfig)
    SFTTrainer(config).run()
    pattern = r"held-out accuracy: ([\d.]+) -> ([\d.]+)  \(sampled; greedy ([\d.]+) -> ([\d.]+)\)"
    found = re.search(pattern, capsys.readouterr().out)
    before, after, greedy_before, greedy_after = map(float, found.groups())
    assert after - before > 0.3 and greedy_after - greedy_before > 0.08


# ------------------------------------------------------------------------------------------ settings

# arXiv 2503.05132 and the authors' run_sft_SAT.sh and sft.py (defaults of TRL 0.14 and transformers 4.49 included).
PAPER = {
    "model": "Qwen/Qwen2-VL-2B",
    "data": "array/SAT",
    "first_n": 15000,
    "learning_rate": 2e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "num_train_epochs": 2.0,
    "max_steps": None,
    "num_processes": 4,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "max_pixels": 512 * 28 * 28,
    "completion_only_loss": False,
    "gradient_checkpointing": True,
    "save_steps": 300,
}


def test_the_papers_recipe(capsys):
    assert main(["--local_rank=0", "sft", "--recipe", "visualthinker-2b-sft", "--dry-run"]) == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    assert {name: settings[name] for name in PAPER} == PAPER


def test_the_papers_text(make, tmp_path):
    """A whole training text, letter by letter, as the Instruct model's chat template renders the conversation."""
    config = load_config("visualthinker-2b-sft", kind=SFTConfig)
    trainer, _ = make(template=config.template, target=config.target, literal_image=True)
    sample = Sample("Is it left or right?", ["left", "right"], "left", [None])
    conversation = [
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {
                    "type": "text",
                    "text": "<image> Answer in natural language. Is it left or right? "
                    "Choose between the following options: left or right",
                },
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "left"}]},
    ]
    tokenizer = trainer.session.processor.tokenizer
    template = tokenizer.chat_template["instruct"]
    whole = tokenizer.apply_chat_template(conversation, chat_template=template, tokenize=False)
    target = trainer.session.processor.decode(trainer.target.tokens(sample), keep_special=True)
    assert trainer.session.prompt_builder.text(sample) + target == whole


def test_settings_of_both_kinds():
    assert "visualthinker-2b-sft" in recipe_names(SFTConfig)
    assert not set(recipe_names(SFTConfig)) & set(recipe_names())
    described = field_help(SFTConfig)
    assert list(described) == list(field_names(SFTConfig)) and all(described.values())
    with pytest.raises(UserError, match="did you mean visualthinker-2b-sft"):
        load_config("visualthinker-2b-sat", kind=SFTConfig)


@pytest.mark.parametrize("name", recipe_names(SFTConfig))
def test_recipes_survive_a_round_trip(name, tmp_path):
    config = load_config(name, kind=SFTConfig)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(file=tmp_path / "config.yaml", kind=SFTConfig) == config


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit):
        main(["sft", "--help"])
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in field_names(SFTConfig)) and "--beta" not in text
