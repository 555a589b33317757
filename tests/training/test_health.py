"""Steps that have to be left out leave no trace in the weights, and figures out of bounds are said once."""

import functools
import json
import math
import statistics
import subprocess

import pytest
import torch
from launchers import ROOT, SHORT, deepspeed_launcher, environment
from make_trainer import asked, assert_same, make, state
from steps import scored

from vtfast.config import load_config
from vtfast.data.batches import batch_indices
from vtfast.training.gradients import drop_gradients, nonfinite_gradients
from vtfast.training.health import Health, warn_out_of_bounds
from vtfast.utils.errors import UserError


def poison(trainer, where, monkeypatch):
    """The second pass of the next step: its loss, or one weight's gradient, is not finite."""
    calls = []
    objective = type(trainer.session.engine.module)
    forward = objective.forward

    def poisoned(self, *arguments):
        loss, *rest = forward(self, *arguments)
        calls.append(1)
        if len(calls) == 2 and where == "loss":
            loss = loss + loss.detach() * 0 + float("inf")  # its gradient stays finite
        if len(calls) == 2 and where == "gradient":
            weight = trainer.session.policy.language_model.layers[1].mlp.up_proj.weight
            loss = loss + Explode.apply(weight)
        return loss, *rest

    monkeypatch.setattr(objective, "forward", poisoned)


class Explode(torch.autograd.Function):
    """0, with a gradient in which one number is nan."""

    @staticmethod
    def forward(context, weight):
        context.shape = weight.shape
        return weight.new_zeros(())

    @staticmethod
    def backward(context, gradient):
        out = gradient.new_zeros(context.shape)
        out[1, 2] = float("nan")
        return out


@pytest.fixture(scope="module")
def without_the_third(tmp_path_factory):
    """dtype -> state of a run that never made step 3."""

    @functools.cache
    def run(dtype):
        plain = make(tmp_path_factory.mktemp("runs") / "plain", dtype=dtype, beta=0.04)
        for step, questions in enumerate(asked(plain, range(1, 5)), 1):
            if step != 3:
                plain.step(step, questions)
        return state(plain)

    return run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_poisoned_step_is_left_out_to_the_bit(tmp_path, monkeypatch, where, dtype, without_the_third):
    """No weight, no optimizer state, no schedule moves, and the steps after it are those of a run without it."""
    poisoned = make(tmp_path / "poisoned", dtype=dtype, beta=0.04)
    states, lines = [], []
    for step, questions in enumerate(asked(poisoned, range(1, 5)), 1):
        with monkeypatch.context() as patch:
            if step == 3:
                poison(poisoned, where, patch)
            lines.append(poisoned.step(step, questions)[0])
            states.append(state(poisoned))
    assert_same(states[1], states[2])
    assert_same(states[3], without_the_third(dtype))

    assert [line["step_left_out"] for line in lines] == [0, 0, 1, 0]
    assert [line["nonfinite_steps"] for line in lines] == [0, 0, 1, 1]
    assert math.isnan(lines[2]["grad_norm"])
    assert all(line["grad_norm"] > 0 for line in lines if line is not lines[2])

    (line,) = read(poisoned)
    assert (line["step"], line["kind"], line["weights"]) == (3, "nonfinite", [])
    assert len(line["passes"]) == lines[2]["passes"] > 1
    rows = {row for one in line["passes"] for row in one["rows"]}
    samples = poisoned.session.train_samples
    assert rows <= {samples[i].row for i in batch_indices(len(samples), 3, 4, poisoned.config.seed)}
    assert all(len(one["prompts"]) == len(one["rows"]) for one in line["passes"])
    if where == "loss":
        assert [one["loss"] == "inf" for one in line["passes"]].index(True) == 1
        assert line["gradients"] == []
    else:
        assert line["gradients"] == ["model.language_model.layers.1.mlp.up_proj.weight"]
        assert all(isinstance(one["loss"], float) for one in line["passes"])


def read(trainer):
    return [json.loads(x) for x in (trainer.session.folder / "nonfinite.jsonl").read_text().splitlines()]


def test_too_many_in_a_row_stop_the_run(tmp_path, monkeypatch):
    trainer = make(tmp_path, max_nonfinite_steps=2)
    weight = trainer.session.policy.language_model.layers[0].mlp.up_proj.weight
    for step, questions in enumerate(asked(trainer, range(1, 5)), 1):
        kept = weight.detach().clone()
        if step in (1, 3, 4):  # one alone, and two in a row

            def spoil(batches, step):
                weight.data.view(-1)[:1].fill_(math.nan)
                return batches

            monkeypatch.setattr(trainer, "score_logprobs", spoil)
        else:
            monkeypatch.undo()
        if step == 4:
            with pytest.raises(UserError, match=r"in a row .--max_nonfinite_steps 2.*nonfinite.jsonl"):
                trainer.step(step, questions)
            break
        metrics, _ = trainer.step(step, questions)
        assert metrics["step_left_out"] == (step != 2)
        weight.data.copy_(kept)
    assert [line["step"] for line in read(trainer)] == [1, 3, 4]
    assert trainer.session.health.nonfinite_steps == 3 and trainer.session.health.empty_steps == 0
    assert all(line["weights"] == ["model.language_model.layers.0.mlp.up_proj.weight"] for line in read(trainer))
    assert all(one["loss"] == "nan" for line in read(trainer) for one in line["passes"])


def test_steps_without_a_usable_question_are_left_out_too(tmp_path):
    trainer = make(tmp_path)
    steps = asked(trainer, range(1, 7))
    trainer.step(1, next(steps))
    before = state(trainer)
    limit = trainer.config.max_prompt_length
    for step in (2, 3):
        trainer.config.max_prompt_length = 5
        metrics, rows = trainer.step(step, next(steps))
        assert rows == [] and metrics["skipped_samples"] == 4 and metrics["num_tokens"] == 0
        assert metrics["reward"] is None and metrics["loss"] is None and metrics["entropy"] is None
        assert (metrics["empty_steps"], metrics["step_left_out"]) == (step - 1, 1)
        assert trainer.summary(metrics) == "no sample could be used"
    assert_same(before, state(trainer))
    trainer.config.max_prompt_length = limit
    metrics, _ = trainer.step(4, next(steps))
    assert (metrics["empty_steps"], metrics["nonfinite_steps"], metrics["step_left_out"]) == (2, 0, 0)
    trainer.session.health.left_out_in_a_row = 2
    trainer.config.max_prompt_length = 5
    with pytest.raises(UserError, match=r"none of its samples could be used, see skipped.jsonl; 3 steps in a row"):
        trainer.step(5, next(steps))
    assert [(line["step"], line["kind"]) for line in read(trainer)] == [(2, "empty"), (3, "empty"), (5, "empty")]


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_an_answer_whose_sampled_log_probs_are_not_finite_is_skipped(tmp_path, monkeypatch, value):
    trainer = make(tmp_path)
    generate = trainer.session.rollout_engine.generate

    def spoilt(*arguments, **settings):
        answers = generate(*arguments, **settings)
        answers[2][1].logprobs[-1] = value
        return answers

    monkeypatch.setattr(trainer.session.rollout_engine, "generate", spoilt)
    questions = next(asked(trainer, [1]))
    metrics, rows = trainer.step(1, questions)
    assert metrics["skipped_samples"] == 1 and metrics["sampler_drift"] < 1e-4
    assert questions[2].sample.row not in {row["row"] for row in rows} and len(rows) == 3 * 4
    assert "log-probs are not finite" in (trainer.session.folder / "skipped.jsonl").read_text()


def test_figures_out_of_bounds_are_said_once_an_episode(caplog):
    config = load_config(overrides={"kl_warning": 0.5, "entropy_warning": 0.1})
    well = {"kl": 0.1, "entropy": 0.5, "sampler_drift": 0.0, "sampler_drift_max": 0.0}
    health, said = Health(), []
    changes = [
        {},
        {"kl": 0.6},
        {"kl": 9.0},
        {"kl": None},
        {"kl": 0.7, "entropy": 0.05},
        {"kl": 0.4, "entropy": 0.02},
        {"entropy": math.nan, "kl": 0.6},
        {"sampler_drift": 0.2, "sampler_drift_max": 0.3},
    ]
    for step, change in enumerate(changes):
        caplog.clear()
        warn_out_of_bounds(health, step, well | change, config)
        said.append(caplog.text)
    names = ("kl", "entropy", "sampler_drift")
    assert [[name for name in names if f"--{name}_warning" in text] for text in said] == [
        [],
        ["kl"],
        [],
        [],
        ["entropy"],
        [],
        ["kl"],
        ["sampler_drift"],
    ]
    assert "step 1: the policy is 0.6 nats a token from" in said[1]
    assert "by 0.2 on average, 0.3 at most" in said[7]


def test_health_survives_a_checkpoint():
    health = Health(nonfinite_steps=3, empty_steps=1, left_out_in_a_row=2, alarms=["kl"])
    again = Health()
    again.load_state_dict(json.loads(json.dumps(health.state_dict())))
    assert again == health and not again.entered("kl", True) and again.entered("entropy", True)
    assert health.alarms == ["kl"]


def test_the_steps_figures(tmp_path):
    """Spread of each reward over all completions, and what the process holds."""
    trainer = make(tmp_path, reward_funcs="accuracy,format,length")
    metrics, rows = trainer.step(1, next(asked(trainer, [1])))
    for name in ("accuracy", "format", "length"):
        values = [row["rewards"][name] for row in rows]
        assert metrics[f"rewards/{name}/std"] == pytest.approx(statistics.stdev(values), rel=1e-4)
    assert metrics["rewards/length/std"] > 0
    assert "std" not in trainer.summary(metrics)
    assert 0 < metrics["resident_gb"] <= metrics["memory_gb"] * 1.001
    with (tmp_path / "config.yaml").open(), (tmp_path / "config.yaml").open():
        more, _ = trainer.step(2, next(asked(trainer, [2])))
    assert more["open_files"] == metrics["open_files"] + 2
    assert metrics["token_budget"] == 200


def test_dropped_gradients_leave_nothing(tmp_path):
    """Whether all passes of a step ran or only the first: the next step's gradient is its own alone."""
    trainer = make(tmp_path)
    questions = next(asked(trainer, [1]))
    work = trainer.balance(scored(trainer, questions), 1)
    counts = (work.num_sequences, work.num_tokens)
    norms = []
    for ran in (len(work.micro_batches), 1, 0):
        trainer.session.engine.train()
        trainer.session.updater.accumulate(1, work, counts)
        drop_gradients(trainer.session.engine)
        for batch in work.micro_batches[:ran]:
            trainer.session.engine.set_gradient_accumulation_boundary(False)
            trainer.session.engine.backward(trainer.session.engine(batch, *counts)[0])
        drop_gradients(trainer.session.engine)
        trainer.session.updater.accumulate(1, work, counts)
        assert nonfinite_gradients(trainer.session.engine) == []
        norms.append(float(trainer.session.engine.optimizer.scaled_global_norm()))
        drop_gradients(trainer.session.engine)
    assert norms[0] == norms[1] == norms[2] > 0


SCRIPT = """
import sys
from torch import distributed
from vtfast.training import grpo_objective as objective

forward, calls = objective.GRPOObjective.forward, []
def poisoned(self, *arguments):
    loss, *rest = forward(self, *arguments)
    calls.append(1)
    if distributed.get_rank() == 1 and len(calls) == 2:
        loss = loss + float("inf")
    return loss, *rest
objective.GRPOObjective.forward = poisoned

from vtfast.cli import main
sys.exit(main(["train", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_two_ranks_leave_out_a_step_that_one_finds_fault_with(tmp_path):
    """Its gradients are finite, so that nothing but the agreement tells the other rank."""
    script, folder = tmp_path / "poisoned.py", tmp_path / "run"
    script.write_text(SCRIPT)
    command = [*deepspeed_launcher(), str(script), *SHORT]
    command += ["--per_device_train_batch_size", "4", "--eval_data", "none", "--output_dir", folder]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step_left_out"] for line in lines] == [0, 1, 0]
    assert [line["loss"] is None for line in lines] == [False, True, False]
    assert lines[2]["learning_rate"] == lines[1]["learning_rate"] > lines[0]["learning_rate"]
    (line,) = (folder / "nonfinite.jsonl").read_text().splitlines()
    passes = json.loads(line)["passes"]
    assert [(one["rank"], one["loss"] == "inf") for one in passes] == [(0, False), (1, True)]
    assert all(one["rows"] for one in passes)
