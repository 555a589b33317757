"""The rollout engine against Hugging Face's generate and against the training forward."""

import pytest
import torch
from hugging_face import inputs
from transformers import GenerationConfig

from vtfast.model.loading import load_model
from vtfast.rollout import RolloutEngine, Sampling
from vtfast.scoring import completion_logprobs


def test_greedy_equals_hugging_face_generate(policy, prompts):
    """One prompt at a time there, all four of different lengths and image counts in one batch here."""
    ours = RolloutEngine(policy).generate(prompts, 1, Sampling(max_new_tokens=12, greedy=True))
    for prompt, (completion,) in zip(prompts, ours, strict=True):
        theirs = policy.module.generate(
            **inputs(prompt),
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=12, eos_token_id=list(policy.eos_ids), pad_token_id=0
            ),
        )[0, len(prompt.ids) :].tolist()
        assert completion.tokens == theirs


def test_logprobs_equal_the_training_forward(policy, prompts):
    rolled = RolloutEngine(policy).generate(prompts, 3, Sampling(temperature=0.8, max_new_tokens=16), seed=5)
    with torch.no_grad():
        scored = completion_logprobs(policy, prompts, [[c.tokens for c in group] for group in rolled], temperature=0.8)
    for group, logps in zip(rolled, scored, strict=True):
        for completion, logp in zip(group, logps, strict=True):
            torch.testing.assert_close(torch.tensor(completion.logprobs), logp, rtol=1e-5, atol=1e-5)


def test_a_rows_tokens_depend_on_seed_prompt_and_sample_number_only(policy, prompts):
    engine, sampling = RolloutEngine(policy), Sampling(max_new_tokens=10)
    together = engine.generate(prompts, 4, sampling, seed=9)
    backwards = engine.generate(prompts[::-1], 2, sampling, seed=9)[::-1]
    for prompt, group, fewer in zip(prompts, together, backwards, strict=True):
        tokens = [completion.tokens for completion in group]
        assert tokens[:2] == [completion.tokens for completion in fewer]
        assert tokens == [c.tokens for c in engine.generate([prompt], 4, sampling, seed=9)[0]]
        assert len({tuple(row) for row in tokens}) == 4, "samples of one prompt must differ"
    assert together != engine.generate(prompts, 4, sampling, seed=10)


def test_sampling_follows_the_softmax(policy, prompts):
    """50,000 first tokens, probabilities from a tenth to below 1e-4, against the model's distribution (chi-square)."""
    engine, sampling, V = (RolloutEngine(policy), Sampling(0.25, max_new_tokens=1), policy.head.shape[0])
    drawn = [
        completion.tokens[0]
        for seed in range(10)
        for completion in engine.generate(prompts[:1], 5_000, sampling, seed)[0]
    ]
    counts = torch.bincount(torch.tensor(drawn), minlength=V).double()
    with torch.no_grad():
        scored = completion_logprobs(policy, prompts[:1], [[[token] for token in range(V)]], temperature=0.25)
    expected = 50_000 * torch.stack(scored[0])[:, 0].double().exp()
    rare = expected < 10
    bins = torch.cat([expected[~rare], expected[rare].sum()[None]])
    found = torch.cat([counts[~rare], counts[rare].sum()[None]])
    statistic, degrees = ((found - bins) ** 2 / bins).sum(), len(bins) - 1
    assert abs(statistic - degrees) < 5 * (2 * degrees) ** 0.5
    near = (expected > 2.5) & (expected < 10)  # about 1e-4
    assert near.sum() >= 5 and abs(counts[near].sum() - expected[near].sum()) < 5 * expected[near].sum() ** 0.5


def test_end_tokens_inside_a_prompt_end_nothing(policy, processor):
    end = processor.tokenizer.convert_ids_to_tokens(policy.eos_ids[0])
    prompt = processor.encode(f"{end}How{end} many?", [])
    assert prompt.ids[0] == policy.eos_ids[0]
    config = GenerationConfig(do_sample=False, max_new_tokens=8, eos_token_id=list(policy.eos_ids), pad_token_id=0)
    theirs = policy.module.generate(**inputs(prompt), generation_config=config)[0, len(prompt.ids) :]
    greedy = Sampling(max_new_tokens=8, greedy=True)
    assert RolloutEngine(policy).generate([prompt], 1, greedy)[0][0].tokens == theirs.tolist()


def test_one_straggler_runs_to_the_limit(policy, prompts):
    """All rows but one end with their first token; the last one goes on alone, with the tokens it has in company."""
    free = RolloutEngine(type(policy)(policy.module, ())).generate(prompts, 2, Sampling(max_new_tokens=20), 3)
    last = free[-1][-1]
    ends = {c.tokens[0] for group in free for c in group if c is not last}
    assert not ends & set(last.tokens), "another seed is needed"
    rolled = RolloutEngine(type(policy)(policy.module, tuple(ends))).generate(
        prompts, 2, Sampling(max_new_tokens=20), 3
    )
    lengths = [len(c.tokens) for group in rolled for c in group]
    assert lengths == [1] * 7 + [20] and rolled[-1][-1].tokens == last.tokens
    assert rolled[-1][-1].finish_reason == "length"


def test_the_end_token_belongs_to_the_completion(policy, prompts):
    rows = RolloutEngine(policy).generate(prompts, 64, Sampling(max_new_tokens=24), seed=2)
    rows = [completion for group in rows for completion in group]
    stopped = [c for c in rows if c.finish_reason == "stop"]
    assert stopped and len(stopped) < len(rows)
    assert all(c.tokens[-1] in policy.eos_ids and len(c.logprobs) == len(c.tokens) for c in stopped)
    assert all(len(c.tokens) == 24 for c in rows if c.finish_reason == "length")
    assert all(token not in policy.eos_ids for c in rows for token in c.tokens[:-1])


def test_weights_edited_in_place_are_seen(random_path, prompts):
    policy = load_model(random_path)
    engine, sampling = RolloutEngine(policy), Sampling(max_new_tokens=8, greedy=True)
    before = engine.generate(prompts, 1, sampling)
    with torch.no_grad():
        policy.language_model.layers[0].mlp.down_proj.weight.mul_(-1)
    assert engine.generate(prompts, 1, sampling) != before


def test_first_token_end_and_limits(policy, prompts):
    """A head that always ends: every row is one token long."""
    engine = RolloutEngine(policy)
    certain = RolloutEngine(type(policy)(policy.module, tuple(range(policy.head.shape[0]))))
    for group in certain.generate(prompts, 2, Sampling(max_new_tokens=5)):
        assert [(len(c.tokens), c.finish_reason) for c in group] == [(1, "stop")] * 2
    assert engine.generate([], 2) == []
    with pytest.raises(ValueError, match="max_new_tokens"):
        Sampling(max_new_tokens=0)


def test_rows_that_finish_early_leave_the_others_as_they_were(policy, prompts):
    """A third of the vocabulary ends a row, so the batch is halved again and again while it runs."""
    ends = tuple(range(0, policy.head.shape[0], 3))
    early = RolloutEngine(type(policy)(policy.module, ends))
    sampling = Sampling(max_new_tokens=12)
    rolled = early.generate(prompts, 8, sampling, seed=4)
    whole = RolloutEngine(type(policy)(policy.module, ())).generate(prompts, 8, sampling, seed=4)
    with torch.no_grad():
        scored = completion_logprobs(policy, prompts, [[c.tokens for c in group] for group in rolled])
    assert len({len(c.tokens) for group in rolled for c in group}) > 4
    for short, long, logps in zip(rolled, whole, scored, strict=True):
        for row, (completion, full) in enumerate(zip(short, long, strict=True)):
            assert completion.tokens == full.tokens[: len(completion.tokens)]
            torch.testing.assert_close(torch.tensor(completion.logprobs), logps[row], rtol=1e-5, atol=1e-5)
