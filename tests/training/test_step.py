"""One optimizer step taken apart: what an advantage is, which way it pushes, and what must not move."""

import json

import pytest
import torch
from steps import PROPORTIONAL, logprobs, scored, shake, weights

from vtfast.config import Config
from vtfast.training.groups import MicroBatch
from vtfast.training.grpo_objective import GRPOObjective, loss_spec
from vtfast.training.metrics import step_metrics
from vtfast.utils.errors import UserError


def test_a_step_makes_better_answers_likelier(make):
    trainer, questions = make(learning_rate=1e-4)
    groups = scored(trainer, questions)
    advantage = torch.cat([group.advantage for group in groups])
    assert (advantage > 0).any() and (advantage < 0).any()
    before = logprobs(trainer, groups)
    trainer.update(trainer.balance(groups, 1), 1)
    change = logprobs(trainer, groups) - before
    assert change[advantage > 0].mean() > 0 > change[advantage < 0].mean()


def test_advantages_are_the_papers(make):
    """(r - mean) / (unbiased std + 1e-4) over the group, r the weighted sum of the rewards."""
    trainer, questions = make(reward_weights="2,0.5")
    groups = scored(trainer, questions)
    for group in groups:
        accuracy, form = group.rewards
        r = (2 * accuracy + 0.5 * form).double()
        expected = (r - r.mean()) / (((r - r.mean()) ** 2).sum().div(7).sqrt() + 1e-4)
        torch.testing.assert_close(group.advantage.double(), expected, rtol=1e-5, atol=1e-6)


FROZEN = {
    "vision,embeddings": ("visual.blocks", "visual.patch_embed", "embed_tokens", "lm_head"),
    "language": ("language_model", "lm_head"),
    "vision,merger": ("visual",),
}


@pytest.mark.parametrize("freeze", list(FROZEN))
def test_frozen_parts_do_not_move(make, freeze):
    """Not by a bit; they have no gradient and no optimizer state either."""
    trainer, questions = make(freeze=freeze, learning_rate=1e-3, weight_decay=0.1)
    before = weights(trainer)
    trainer.update(trainer.balance(scored(trainer, questions), 1), 1)
    trained = 0
    for name, value in trainer.session.policy.module.named_parameters():
        frozen = any(part in name for part in FROZEN[freeze])
        assert value.equal(before[name]) == frozen, name
        assert value.grad is None or not frozen
        trained += 0 if frozen else value.numel()
    states = trainer.session.engine.optimizer.optimizer.state.values()
    assert sum(state["exp_avg"].numel() for state in states) == pytest.approx(trained, abs=8)


def test_cutting_the_batch_changes_nothing(make):
    """One row for all; rows of a few groups; and rows so short that every group is split and repeats its prompt."""
    results = []
    for budget in (None, 700, 60):
        trainer, questions = make(token_budget=budget, beta=0.04, **PROPORTIONAL)
        groups = scored(trainer, questions)
        work = trainer.balance(groups, 1)
        trainer.score_logprobs(work, 1)
        shake(trainer, 0.02)  # away from the reference, so that the KL has a gradient
        results.append((len(work.micro_batches), trainer.update(work, 1), weights(trainer)))
    (one, whole, expected), (few, *_), (many, *_) = results
    assert one == 1 < few < many
    for _, (sums, norm, *_), after in results[1:]:
        assert norm == pytest.approx(whole[1], rel=1e-4)
        assert sums == pytest.approx(whole[0], rel=1e-4, abs=1e-5) and sums["kl"] > 0.1
        for name, value in after.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=2e-6, msg=name)


def test_groups_without_signal_are_skipped_exactly(make):
    """Equal rewards, no advantage, no gradient: not running them changes no weight and no denominator."""
    results = []
    for skip in (True, False):
        trainer, questions = make(**PROPORTIONAL)
        groups = scored(trainer, questions)
        groups[2].advantage = groups[5].advantage = torch.zeros(8)
        before = sum(1 for group in groups if not group.advantage.any())
        trainer.config.beta = 0.0 if skip else 1.0  # what balance goes by
        work = trainer.balance(groups, 1)
        (parts,) = [batch.parts for batch in work.micro_batches]
        assert len(parts) == (8 - before if skip else 8)
        assert work.skipped == (before / 8 if skip else 0) and work.num_sequences == 64
        sums, norm, *_ = trainer.update(work, 1)
        results.append((sums["loss"], norm, weights(trainer)))
    (loss, norm, skipped), (loss_all, norm_all, kept) = results
    assert (loss, norm) == pytest.approx((loss_all, norm_all), rel=1e-5, abs=1e-6) and norm > 0.1
    for name, value in skipped.items():
        torch.testing.assert_close(value, kept[name], rtol=1e-5, atol=1e-6, msg=name)


def test_a_step_without_any_signal_is_still_a_step(make):
    trainer, questions = make(learning_rate=1e-3)
    groups = scored(trainer, questions)
    for group in groups:
        group.advantage = torch.zeros(8)
    before = weights(trainer)
    work = trainer.balance(groups, 1)
    assert work.skipped == 1 and [batch.parts for batch in work.micro_batches] == [[]]
    sums, norm, rate, *_ = trainer.update(work, 1)
    assert sums["loss"] == norm == sums["scored_tokens"] == 0 and rate == 1e-3
    assert trainer.session.engine.global_steps == 1 and trainer.session.engine.get_lr()[0] < rate
    assert all(value.equal(before[name]) for name, value in weights(trainer).items())


@pytest.mark.parametrize(
    "settings", [{}, {"beta": 0.04}, {"freeze": "language"}, {"freeze": "vision"}, {"use_peft": True}]
)
def test_a_rank_with_nothing_to_do_reduces_zeros(make, settings):
    """Every trained weight gets a gradient of zero, in the order in which other ranks get theirs."""
    trainer, questions = make(**settings)
    objective = GRPOObjective(trainer.session.policy, loss_spec(trainer.config))  # without DeepSpeed's hooks
    trained = {n: p for n, p in objective.named_parameters() if p.requires_grad}
    arrived = []
    for name, parameter in trained.items():
        parameter.register_hook(lambda _, name=name: arrived.append(name))
    groups = scored(trainer, questions)
    work = trainer.balance(groups, 1)
    trainer.score_logprobs(work, 1)
    orders = []
    for batch in (*work.micro_batches, MicroBatch([], {}, trainer.session.policy)):
        arrived.clear()
        loss, sums, drift = objective(batch, 64, 900)
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=False)
        orders.append(list(arrived))
    assert loss.item() == 0 and not sums.any() and drift == 0
    assert not any(gradient.any() for gradient in gradients)
    assert orders[0] == orders[-1] and set(orders[0]) == set(trained)


def test_scale_rewards_reaches_the_advantages(make):
    trainer, questions = make(scale_rewards="none")
    for group in scored(trainer, questions):
        torch.testing.assert_close(group.advantage, group.total - group.total.mean())


def test_checkpointing_recomputes_in_the_update_alone(make):
    trainer, questions = make(gradient_checkpointing=True)
    groups = scored(trainer, questions)
    work = trainer.balance(groups, 1)
    calls = []
    trainer.session.policy.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    trainer.update(work, 1)
    assert len(calls) == 2 * len(work.micro_batches)
    assert not trainer.session.policy.module.training


def test_a_frozen_tower_runs_once_a_step(make):
    """For the rollout, the reference, the old log-probs and the update."""
    trainer, questions = make(freeze="vision", beta=0.04, num_iterations=2)
    calls = []
    trainer.session.policy.vision.module.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    trainer.reference.copy.vision.module.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    trainer.step(1, questions)
    assert len(calls) == 1


def test_the_prompt_limit_holds_at_the_step_too(make):
    trainer, questions = make()
    trainer.config.max_prompt_length = 5
    assert trainer.sample(questions, 1) == []


def test_token_level_losses_divide_by_the_whole_steps_tokens(make):
    """Those of other passes and of groups left out included."""
    results = []
    for budget, beta in ((None, 1.0), (None, 0.0), (300, 0.0)):
        trainer, questions = make(loss_type="dapo", token_budget=budget, **PROPORTIONAL)
        groups = scored(trainer, questions)
        groups[2].advantage = groups[5].advantage = torch.zeros(8)
        trainer.config.beta = beta
        work = trainer.balance(groups, 1)
        assert work.num_tokens == sum(sum(group.lengths) for group in groups)
        sums, norm, *_ = trainer.update(work, 1)
        results.append((sums["loss"], norm))
    assert results[1] == pytest.approx(results[0], rel=1e-4, abs=1e-6)
    assert results[2] == pytest.approx(results[0], rel=1e-4, abs=1e-6)


def test_lora_trains_adapters_alone(make):
    trainer, questions = make(use_peft=True, lora_r=2, beta=0.04, learning_rate=1e-2)
    before = weights(trainer)
    groups = scored(trainer, questions)
    work = trainer.balance(groups, 1)
    trainer.score_logprobs(work, 1)
    trainer.update(work, 1)
    after = logprobs(trainer, groups)
    for name, value in weights(trainer).items():
        # An adapter's A has no gradient while its B is zero: one step moves B alone.
        assert value.equal(before[name]) != ("lora_B" in name), name
    trainer.score_logprobs(work, 1)
    reference = torch.stack([x.sum() for group in groups for x in group.logprobs["reference"]])
    assert (reference - after).abs().max() > 1e-3, "the reference is the model without adapters"


def test_bf16_gradients_are_summed_in_fp32(make, monkeypatch):
    """Over the passes of a step, into buffers that hold more than bf16 can."""
    trainer, questions = make(dtype="bfloat16", token_budget=120, max_grad_norm=0)
    work = trainer.balance(scored(trainer, questions), 1)
    assert len(work.micro_batches) > 2
    seen = []
    monkeypatch.setattr(
        trainer.session.engine, "step", lambda: seen.extend(trainer.session.engine.optimizer.averaged_gradients[0])
    )
    monkeypatch.setattr(trainer.session.engine, "get_global_grad_norm", lambda: 0.0)
    trainer.update(work, 1)
    assert seen and all(gradient.dtype == torch.float32 for gradient in seen)
    finer = [g for g in seen if not g.bfloat16().float().equal(g)]
    assert len(finer) > len(seen) / 2, "sums that bf16 would have rounded"


@pytest.mark.parametrize("spoil", ["prompt", "completion"])
def test_what_cannot_be_trained_on_is_skipped_and_listed(make, spoil, monkeypatch):
    trainer, questions = make()
    if spoil == "prompt":
        questions[3].prompt.image_mask[:] = False
    else:
        generate = trainer.session.rollout_engine.generate

        def empty(prompts, *args, **kwargs):
            completions = generate(prompts, *args, **kwargs)
            completions[3][5].tokens.clear()
            completions[3][5].logprobs.clear()
            return completions

        monkeypatch.setattr(trainer.session.rollout_engine, "generate", empty)
    metrics, rows = trainer.step(1, questions)
    bad = questions[3].sample.row
    assert metrics["skipped_samples"] == 1 and len(rows) == 7 * 8
    assert bad not in {row["row"] for row in rows}
    (line,) = (trainer.session.folder / "skipped.jsonl").read_text().splitlines()
    listed = json.loads(line)
    reason = "placeholders for 0 image tokens" if spoil == "prompt" else "no tokens"
    assert (listed["step"], listed["row"]) == (1, bad) and reason in listed["reason"]
    trainer.session.skip_log.is_strict = True
    with pytest.raises(UserError, match=rf"step 2, .*row {bad} \(counted from 0\): .*{reason}"):
        trainer.step(2, questions)


def test_the_loss_has_the_settings(make):
    config = Config(
        loss_type="dapo",
        beta=0.02,
        epsilon=0.1,
        epsilon_high=0.3,
        delta=2.0,
        temperature=0.7,
        importance_sampling_level="sequence",
        max_completion_length=33,
    )
    spec = loss_spec(config)
    assert (spec.loss_type, spec.beta, spec.epsilon_low, spec.epsilon_high) == ("dapo", 0.02, 0.1, 0.3)
    assert (spec.delta, spec.temperature, spec.max_completion_length) == (2.0, 0.7, 33)
    assert spec.importance_level == "sequence" and loss_spec(Config()).epsilon_high == 0.2


@pytest.mark.parametrize("tau", [0.0, 2.0**-10])
def test_sparse_gradients_are_near_and_logged(make, tau):
    """Of the demo's 400 columns few are likely; the norm of the gradient moves by the share that is left out."""
    trainer, questions = make(sparse_tau=tau)
    groups = scored(trainer, questions)
    update = trainer.update(trainer.balance(groups, 1), 1)
    metrics = step_metrics(groups, update.sums, ["accuracy", "format"], trainer.session.ranks)
    if not tau:
        assert not {"dropped", "dense_rows", "kept"} & set(metrics)
        return
    assert 0 < metrics["dropped"] <= tau and 0 < metrics["kept"] < 1 and 0 <= metrics["dense_rows"] < 1
    exact, _ = make()
    norm = exact.update(exact.balance(groups, 1), 1).grad_norm
    assert update.grad_norm == pytest.approx(norm, rel=0.01) and update.grad_norm != norm


def test_the_length_reward_counts_tokens(make):
    trainer, questions = make(reward_funcs="length")
    for group in scored(trainer, questions):
        assert group.rewards[0].tolist() == pytest.approx([0.001 * len(row) for row in group.tokens])
