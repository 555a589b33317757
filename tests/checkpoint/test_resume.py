"""A run that is ended anywhere and resumed is the run that was never ended: the same numbers, the same weights, bit for
bit."""

import importlib.machinery
import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
from make_files import mixed_rows
from whole_runs import assert_same_run, build, rows, run

KINDS = {
    "plain": {},
    "reference": {"beta": 0.04},
    "twice": {"num_iterations": 2, "beta": 0.04, "learning_rate": 1e-2},
    "lora": {"use_peft": True, "lora_r": 2, "beta": 0.04},
    "frozen": {"freeze": "vision,embeddings", "weight_decay": 0.1},
    "bf16": {"dtype": "bfloat16", "lr_scheduler_type": "cosine"},
    "passes": {"token_budget": 150, "gradient_checkpointing": True},
    "dice": {"reward_funcs": "whole_runs:noisy_reward", "reward_workers": 0},
    "sft": {"recipe": "tiny-spatial-sft"},
}


SLOW = ("reference", "frozen", "passes")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k in SLOW else k for k in KINDS])
def test_a_killed_run_ends_as_if_it_had_not_been(kind, tmp_path, questions):
    settings = questions | KINDS[kind]
    run(tmp_path / "whole", **settings)
    run(tmp_path / "killed", kill_at=3, **settings)
    assert len(rows(tmp_path / "killed")) == 2
    run(tmp_path / "killed", resume_from_checkpoint="last", **settings)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_prompts_of_many_lengths(tmp_path):
    """What the rollout keeps between steps is larger in the run that nobody ended."""
    settings = {
        "data": str(mixed_rows(tmp_path / "mixed.parquet")),
        "eval_data": "none",
        "reward_funcs": "length",
        "template": "r1-zero",
    }
    run(tmp_path / "whole", **settings)
    run(tmp_path / "killed", kill_at=4, **settings)
    run(tmp_path / "killed", resume_from_checkpoint="last", **settings)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_checkpoints_wait_for_the_end_of_a_batch_of_answers(tmp_path, questions, caplog):
    """Answers are not saved, so a run goes on only where it asks anew; its last step is saved wherever it falls."""
    settings = questions | {"num_iterations": 2, "save_steps": 3, "max_steps": 7, "eval_data": "none"}
    run(tmp_path / "run", **settings)
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved == ["step-4", "step-6", "step-7"]
    with caplog.at_level(logging.WARNING, "vtfast"):
        trainer = build(output_dir=str(tmp_path / "run"), resume_from_checkpoint="last", **settings | {"max_steps": 8})
    assert trainer.session.step == 6
    assert "step-7: was saved between two optimizer steps on the same completions" in caplog.text


def test_the_counters_of_a_run_come_back(tmp_path, questions):
    settings = questions | {"eval_data": "none", "recipe": "tiny-spatial-sft", "max_steps": 1}
    trainer = build(output_dir=str(tmp_path / "run"), **settings)
    trainer.session.health.empty_steps = 2
    trainer.session.health.alarms.append("kl")
    trainer.run()
    again = build(output_dir=str(tmp_path / "run"), resume_from_checkpoint="last", **settings)
    assert again.session.health == trainer.session.health
    assert again.session.updater.optimizer.health is again.session.health


class Curves(ModuleType):
    """In place of wandb."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict] = []
        self.steps: list[int] = []

    def init(self, **arguments):
        self.inits.append(arguments)
        return SimpleNamespace(id=arguments.get("id", f"new-{len(self.inits)}"))

    def log(self, values, step):
        self.steps.append(step)

    def finish(self):
        pass


def test_curves_go_on_where_they_were(tmp_path, questions, monkeypatch):
    """Weights & Biases under the run's id, TensorBoard without the points of steps that are done anew."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = Curves()
    monkeypatch.setitem(sys.modules, "wandb", curves)
    curves.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    settings = questions | {
        "eval_data": "none",
        "recipe": "tiny-spatial-sft",
        "report_to": "wandb,tensorboard",
        "save_steps": 2,
    }
    run(tmp_path / "run", kill_at=4, **settings)
    run(tmp_path / "run", resume_from_checkpoint="last", **settings)
    fork = str(tmp_path / "run" / "checkpoints" / "step-2")
    build(output_dir=str(tmp_path / "fork"), resume_from_checkpoint=fork, **settings).run()
    first, second, forked = curves.inits
    assert "id" not in first and (second["id"], second["resume"]) == ("new-1", "allow")
    assert "id" not in forked, "a fork has curves of its own"
    assert curves.steps == [1, 2, 3, 3, 4, 3, 4]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
