"""One optimizer step taken apart: what an advantage is, which way it pushes, and what must not move."""

import pytest
import torch

from vtfast.config import Config, load_config
from vtfast.evaluate.held_out import held_out
from vtfast.objective import loss_spec
from vtfast.questions import batches
from vtfast.scoring import completion_logprobs
from vtfast.trainer import Trainer


@pytest.fixture
def make(tmp_path):
    """(trainer, 8 questions) of the embedded default with some settings changed."""

    def build(**overrides):
        few = {"eval_samples": 8, "warmup_steps": 0, "max_steps": 4, "max_completion_length": 20}
        settings = few | {"per_device_train_batch_size": 8, "output_dir": str(tmp_path / "run")}
        trainer = Trainer(load_config(overrides=settings | overrides))
        asked = batches(
            trainer.asker, trainer.train_samples, [1], per_rank=8, rank=0, ranks=1, seed=0
        )
        return trainer, next(asked)

    return build


def logprobs(trainer, groups) -> torch.Tensor:
    """Summed log-prob of every answer [questions x G]."""
    with torch.no_grad():
        scores = completion_logprobs(
            trainer.policy,
            [group.question.prompt for group in groups],
            [group.tokens for group in groups],
        )
    return torch.stack([logp.sum() for group in scores for logp in group])


def test_a_step_makes_better_answers_likelier(make):
    trainer, questions = make(learning_rate=1e-4)
    groups = trainer.answer(questions, step=1)
    trainer.compare(groups)
    advantage = torch.cat([group.advantage for group in groups])
    assert (advantage > 0).any() and (advantage < 0).any()
    before = logprobs(trainer, groups)
    trainer.update(trainer.share_out(groups))
    change = logprobs(trainer, groups) - before
    assert change[advantage > 0].mean() > 0 > change[advantage < 0].mean()


def test_advantages_are_the_papers(make):
    """(r - mean) / (unbiased std + 1e-4) over the group, r the weighted sum of the rewards."""
    trainer, questions = make(reward_weights="2,0.5")
    groups = trainer.answer(questions, step=1)
    trainer.compare(groups)
    for group in groups:
        accuracy, form = group.rewards
        r = (2 * accuracy + 0.5 * form).double()
        expected = (r - r.mean()) / (((r - r.mean()) ** 2).sum().div(7).sqrt() + 1e-4)
        torch.testing.assert_close(group.advantage.double(), expected, rtol=1e-5, atol=1e-6)


def test_frozen_parts_do_not_move(make):
    trainer, questions = make(freeze="vision,embeddings", learning_rate=1e-3)
    before = {name: value.clone() for name, value in trainer.policy.module.named_parameters()}
    groups = trainer.answer(questions, step=1)
    trainer.compare(groups)
    trainer.update(trainer.share_out(groups))
    frozen = ("visual.blocks", "visual.patch_embed", "embed_tokens", "lm_head")
    for name, value in trainer.policy.module.named_parameters():
        assert value.equal(before[name]) == any(part in name for part in frozen), name


def test_every_step_samples_anew_and_repeatably(make):
    trainer, questions = make()

    def tokens(step):
        return [group.tokens for group in trainer.answer(questions, step)]

    assert tokens(1) == tokens(1) != tokens(2)


def test_greedy_judging_has_no_chance_in_it(make, monkeypatch):
    trainer, _ = make(eval_samples=32)

    def judge():
        arguments = (
            trainer.rollout,
            trainer.asker,
            trainer.held_out_samples,
            trainer.config,
            trainer.ranks,
        )
        return held_out(*arguments).scores

    first = judge()
    monkeypatch.setattr("vtfast.evaluate.held_out.SEED", 5)
    second = judge()
    assert first["greedy"] == second["greedy"] and first["sampled"] != second["sampled"]


def test_the_loss_has_the_settings(make):
    config = Config(
        loss_type="dapo", beta=0.02, epsilon=0.1, epsilon_high=0.3, delta=2.0, temperature=0.7,
        importance_sampling_level="sequence", max_completion_length=33,
    )  # fmt: skip
    spec = loss_spec(config)
    assert (spec.loss_type, spec.beta, spec.epsilon_low, spec.epsilon_high) == (
        "dapo",
        0.02,
        0.1,
        0.3,
    )
    assert (spec.delta, spec.temperature, spec.max_completion_length) == (2.0, 0.7, 33)
    assert spec.importance_level == "sequence" and loss_spec(Config()).epsilon_high == 0.2


def test_the_length_reward_counts_tokens(make):
    trainer, questions = make(reward_funcs="length")
    for group in trainer.answer(questions, step=1):
        assert group.rewards[0].tolist() == pytest.approx(
            [0.001 * len(row) for row in group.tokens]
        )
