"""What a step makes of the sampler: its log-probs, temperature, settings, and answers that are used twice."""

import pytest
import torch
from steps import PROPORTIONAL, logprobs, scored
from vtfast_kernels import reference

from vtfast.evaluate.held_out import evaluate_held_out
from vtfast.training.grpo_objective import loss_spec


def test_old_log_probs_when_answers_are_used_twice(make):
    """The second update's ratio is against the policy that answered, and the loss says what the reference op says."""
    trainer, questions = make(num_iterations=2, learning_rate=1e-2, epsilon=0.05)
    groups = scored(trainer, questions)
    work = trainer.balance(groups, 1)
    trainer.score_logprobs(work, 1)
    old = logprobs(trainer, groups, summed=False)
    (batch,) = work.micro_batches
    order = [groups.index(batch.groups[part.group]) for part in batch.parts]
    ours = batch.logprobs("old")
    torch.testing.assert_close(ours, torch.cat([old[i] for i in order]), rtol=1e-5, atol=1e-5)
    first, *_ = trainer.update(work, 1)
    assert first["clip_ratio/low"] == first["clip_ratio/high"] == 0
    now = logprobs(trainer, groups, summed=False)
    second, *_ = trainer.update(work, 1)
    assert second["clip_ratio/low"] + second["clip_ratio/high"] > 0
    expected = reference.grpo_loss(
        torch.cat([now[i] for i in order]),
        batch.pack.sequence_id,
        batch.advantage(),
        spec=loss_spec(trainer.config),
        old_logp=ours,
        num_sequences=work.num_sequences,
        num_tokens=work.num_tokens,
    )
    assert second["loss"] == pytest.approx(float(expected.loss), rel=1e-4, abs=1e-6)
    for side, share in (("low", expected.clip_low), ("high", expected.clip_high)):
        counted = second[f"clip_ratio/{side}"]
        assert counted == pytest.approx(len(batch.pack.target) * float(share), abs=1.5)


def test_iterations_reuse_answers(make):
    trainer, questions = make(num_iterations=2, per_device_train_batch_size=8)
    first, rows = trainer.step(1, questions)
    second, none = trainer.step(2, None)
    assert len(rows) == 64 and none == []
    assert second["reward"] == first["reward"] and second["time/rollout"] < first["time/rollout"]
    assert second["sampler_drift"] < 1e-5, "measured against the weights that sampled"
    assert trainer.session.engine.global_steps == 2


def spoil_the_sampler(groups):
    """Recorded log-probs that are off by a little."""
    generator = torch.Generator().manual_seed(0)
    for group in groups:
        for answer in group.completions:
            noise = torch.randn(len(answer.logprobs), generator=generator)
            answer.logprobs[:] = (torch.tensor(answer.logprobs) + 0.5 * noise).tolist()


def test_a_sampler_that_is_off_weighs_nothing_unless_asked(make):
    """It is reported as drift. It is only where the loss begins to look for the log-sum-exp."""
    results = []
    for off in (False, True):
        trainer, questions = make(**PROPORTIONAL)
        groups = scored(trainer, questions)
        if off:
            spoil_the_sampler(groups)
        work = trainer.balance(groups, 1)
        (batch,) = work.micro_batches
        now = logprobs(trainer, groups, summed=False)
        order = [groups.index(batch.groups[part.group]) for part in batch.parts]
        drift = (torch.cat([now[i] for i in order]) - batch.sampler_logprobs()).abs().sum()
        sums, grad_norm, *_ = trainer.update(work, 1)
        assert sums["sampler_drift"] == pytest.approx(float(drift), rel=1e-3, abs=1e-2)
        results.append((sums["loss"], sums["entropy"], grad_norm))
    assert results[0] == pytest.approx(results[1], rel=1e-5, abs=1e-6)
    assert results[0][-1] > 1e-3


def test_sampler_scorer_and_loss_have_one_temperature(make):
    trainer, questions = make(temperature=0.6, num_iterations=2)
    groups = scored(trainer, questions)
    work = trainer.balance(groups, 1)
    trainer.score_logprobs(work, 1)
    (batch,) = work.micro_batches
    torch.testing.assert_close(batch.logprobs("old"), batch.sampler_logprobs(), rtol=1e-4, atol=1e-4)
    sums, *_ = trainer.update(work, 1)
    assert sums["sampler_drift"] / sums["scored_tokens"] < 1e-4
    # and the temperature is not a no-op: at 1 the same answers have other log-probs
    assert (torch.cat(logprobs(trainer, groups, summed=False)).sum() - batch.sampler_logprobs().sum()).abs() > 1


def test_the_second_iteration_keeps_the_old_log_probs(make):
    trainer, questions = make(num_iterations=2, learning_rate=1e-2, epsilon=0.05)
    trainer.step(1, questions)
    (batch,) = trainer.experience.batches.micro_batches
    old = batch.logprobs("old").clone()
    metrics, _ = trainer.step(2, None)
    assert batch.logprobs("old").equal(old) and metrics["clip_ratio/low"] + metrics["clip_ratio/high"] > 0


def test_sampler_correction_weighs_by_the_samplers_own_log_probs(make):
    trainer, questions = make(
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_max=1.5,
    )
    groups = scored(trainer, questions)
    spoil_the_sampler(groups)
    now = logprobs(trainer, groups, summed=False)
    work = trainer.balance(groups, 1)
    (batch,) = work.micro_batches
    order = [groups.index(batch.groups[part.group]) for part in batch.parts]
    loss = trainer.update(work, 1)[0]["loss"]
    logp = torch.cat([now[i] for i in order])
    weight = (logp - batch.sampler_logprobs()).exp().clamp(max=1.5)
    lengths = torch.tensor([len(t) for i in order for t in groups[i].tokens])
    per_token = -weight * batch.advantage().repeat_interleave(lengths)
    expected = (per_token / lengths.repeat_interleave(lengths)).sum() / 64
    assert loss == pytest.approx(float(expected), rel=1e-4)


def test_drift_of_the_sampler_is_measured_and_warned_of(make, caplog):
    trainer, questions = make()
    metrics, _ = trainer.step(1, questions)
    assert 0 < metrics["sampler_drift"] <= metrics["sampler_drift_max"] < 1e-4
    generate = trainer.session.rollout_engine.generate

    def off(*args, **kwargs):
        groups = generate(*args, **kwargs)
        for group in groups:
            for completion in group:
                completion.logprobs[:] = [x - 0.25 for x in completion.logprobs]
                completion.logprobs[-1] -= 0.5
        return groups

    trainer.session.rollout_engine.generate = off
    with caplog.at_level("WARNING", logger="vtfast"):
        metrics, _ = trainer.step(2, questions)
    assert 0.25 < metrics["sampler_drift"] < 0.75
    assert metrics["sampler_drift_max"] == pytest.approx(0.75, abs=1e-3)
    assert "step 2: sampled and trained log-probs differ by" in caplog.text


def test_every_step_samples_anew_and_repeatably(make):
    trainer, questions = make()

    def tokens(step):
        return [group.tokens for group in trainer.sample(questions, step)]

    assert tokens(1) == tokens(1) != tokens(2)


def test_greedy_judging_has_no_chance_in_it(make, monkeypatch):
    trainer, _ = make(eval_samples=32)

    def judge():
        arguments = (
            trainer.session.rollout_engine,
            trainer.session.prompt_builder,
            trainer.session.held_out_samples,
            trainer.config,
            trainer.session.ranks,
        )
        return evaluate_held_out(*arguments).scores

    first = judge()
    monkeypatch.setattr("vtfast.evaluate.held_out.SEED", 5)
    second = judge()
    assert first["greedy"] == second["greedy"] and first["sampled"] != second["sampled"]


def test_the_samplers_settings_reach_the_rollout(make):
    """top_k 1 leaves nothing to chance: the answers to a question are all the same, at a drift that the log shows."""
    trainer, questions = make(top_k=1)
    metrics, _ = trainer.step(1, questions)
    for group in trainer.experience.groups:
        assert all(tokens == group.tokens[0] for tokens in group.tokens)
    assert metrics["frac_reward_zero_std"] == 1.0
    trainer, questions = make(repetition_penalty=1.5)
    assert any(len(set(map(tuple, g.tokens))) > 1 for g in trainer.sample(questions, 1))
