"""Out of memory at any operation of a step: the run ends with the weights of the undisturbed one, or with one clear
line and a checkpoint that leads to them."""

import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
from fail_at import MESSAGE, FailAt
from launchers import ROOT, SHORT, assert_close_runs, deepspeed_launcher, environment, run
from make_trainer import asked, assert_same, make, state

from vtfast.cli.main import _as_user_error
from vtfast.training.gradients import drop_gradients
from vtfast.utils.errors import UserError

# With this epsilon Adam's step is the gradient itself; else it is its sign, even where that is rounding.
PROPORTIONAL = {"adam_epsilon": 1.0, "learning_rate": 0.1, "max_grad_norm": 0, "warmup_steps": 0}


class Trials:
    """Step 2 of a run, again and again from the same state. The rollout's cache is there from step 1."""

    def __init__(self, folder: Path, **settings) -> None:
        self.trainer = make(folder, beta=0.04, **PROPORTIONAL | settings)
        self.trainer.step(1, next(asked(self.trainer, [1])))
        self.batch = next(asked(self.trainer, [2]))
        self.start = self.saved()
        self.operations, _ = self.step()
        self.expected = state(self.trainer)
        self.step()
        assert_same(state(self.trainer), self.expected)

    def saved(self):
        engine, health = self.trainer.session.engine, self.trainer.session.health
        numbers = engine.global_steps, engine.get_lr()[0], engine.lr_scheduler.state_dict(), health.state_dict()
        return {name: value.clone() for name, value in self.tensors()}, numbers

    def tensors(self):
        zero = self.trainer.session.engine.optimizer
        yield from self.trainer.session.policy.module.named_parameters()
        for number, flat in enumerate(zero.single_partition_of_fp32_groups):
            yield f"master/{number}", flat
            yield from ((f"{number}/{name}", value) for name, value in zero.optimizer.state[flat].items())

    def reset(self) -> None:
        session = self.trainer.session
        tensors, (steps, rate, schedule, health) = self.start
        drop_gradients(session.engine)
        with torch.no_grad():
            for name, value in self.tensors():
                value.copy_(tensors[name])
        session.engine.global_steps = steps
        session.engine.optimizer.param_groups[0]["lr"] = rate
        session.engine.lr_scheduler.load_state_dict(schedule)
        session.health.load_state_dict(health)
        session.budget.tokens, session.budget.by_first_step = session.budget.limit, {}
        session.updater.optimizer.steps_done = 1
        session.rollout_engine.keep_cache, session.rollout_engine.max_pages = True, None
        session.rollout_engine.max_rows = self.trainer.config.rollout_max_rows

    def step(self, number: int = 0) -> tuple[int, str]:
        """Operations counted, and the one that failed."""
        self.reset()
        with FailAt(number) as mode:
            self.trainer.step(2, self.batch)
        return mode.count, mode.failed

    def outcome(self, number: int) -> str:
        """Of an attempt that fails at operation `number`: the same weights, the same up to rounding, or a message."""
        try:
            _, failed = self.step(number)
        except Exception as error:
            said = _as_user_error(error)
            assert said is not None, f"operation {number}: a traceback"
            assert "out of memory" in str(said) and MESSAGE in str(error) + str(said) and "\n" not in str(said)
            return "half a step" if isinstance(error, UserError) else "outside"
        assert failed, f"operation {number} did not fail"
        try:
            assert_same(state(self.trainer), self.expected)
            return "equal"
        except AssertionError:
            assert_close(state(self.trainer), self.expected)
            return "close"


def assert_close(one, other):
    assert one[1:] == other[1:]
    for name, value in one[0].items():
        torch.testing.assert_close(value, other[0][name], rtol=1e-4, atol=1e-5, msg=name)


def campaign(folder, trials: int, **settings) -> Counter:
    made = Trials(folder, **settings)
    stride = max(1, made.operations // trials)
    outcomes = Counter(made.outcome(number) for number in range(1, made.operations + 1, stride))
    print(f"{sum(outcomes.values())} trials over {made.operations} operations: {dict(outcomes)}")
    return outcomes


def test_out_of_memory_at_some_operations_of_a_step(tmp_path):
    outcomes = campaign(tmp_path, 16)
    assert outcomes["equal"] + outcomes["close"] >= 14


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"dtype": "bfloat16"}, {"offload_reference": True, "num_iterations": 2}])
def test_out_of_memory_at_many_operations_of_a_step(tmp_path, settings):
    outcomes = campaign(tmp_path, 150, **settings)
    assert outcomes["equal"] + outcomes["close"] >= 140


LAUNCHER = deepspeed_launcher()
FLAGS = ["--per_device_train_batch_size", "4", "--eval_data", "none", "--beta", "0.04", "--save_steps", "1"]
FAIL_AT = ROOT / "tests" / "helpers" / "fail_at.py"


@pytest.mark.slow
def test_out_of_memory_on_one_of_two_ranks(tmp_path):
    """Ends well, or with one line, from which the same command resumes."""
    run(tmp_path / "plain", *FLAGS, launcher=LAUNCHER)
    resumed = 0
    for trial in range(12):
        folder = tmp_path / f"trial-{trial}"
        where = [str(trial % 2), "2", str((trial + 0.5) / 12)]
        command = [*LAUNCHER, str(FAIL_AT), *where, *SHORT, *FLAGS, "--output_dir", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=300)
        said = done.stdout + done.stderr
        assert "Traceback" not in said and "planted in" in said, said[-3000:]
        if done.returncode:
            assert said.count("error: ") == 1, said[-3000:]
            run(folder, *FLAGS, "--resume_from_checkpoint", "last", launcher=LAUNCHER)
            resumed += 1
        assert_close_runs(tmp_path / "plain", folder)
    print(f"12 trials on 2 ranks, {resumed} of them resumed from a checkpoint")
