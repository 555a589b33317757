"""The rollout's pages, admission, warped sampling and other ways out of the ordinary."""

import functools
import random

import pytest
import torch
from hugging_face import inputs
from rollouts import everything_is_free, tokens
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import logits_process as hf

from vtfast.model.adapters import add_lora
from vtfast.model.loading import load_model
from vtfast.rollout import RolloutEngine, Sampling, engine, scheduler
from vtfast.rollout.decode import Decoder
from vtfast.rollout.kv_cache import PagedCache
from vtfast.rollout.logits_processors import sample_with_processors
from vtfast.scoring import completion_logprobs
from vtfast.utils.errors import UserError

SAMPLING = Sampling(max_new_tokens=12)


def test_pages_of_a_group_by_hand():
    cache = PagedCache(1, 10, 4, 1, 2, torch.float32, torch.device("cpu"))
    group = cache.allocate(prompt_tokens=10, rows=2, new_tokens=5)  # 2 full pages; 2 left over + 5 new: 2 pages a row
    assert len(group.shared) == 2 and [len(own) for own in group.own] == [2, 2]
    assert len({*group.all}) == 6 and 0 not in group.all and len(cache.free) == 4
    source, slots = cache.prompt_slots(group, 10)
    assert source.tolist() == [*range(8), 8, 9, 8, 9], "the rest of the prompt once for each row"
    pages = [slot // 4 for slot in slots.tolist()]
    assert pages == [group.shared[0]] * 4 + [group.shared[1]] * 4 + [group.own[0][0]] * 2 + [group.own[1][0]] * 2
    assert cache.allocate(10, 2, 5) is None, "6 pages are not free"
    with pytest.raises(UserError, match=r"needs 18 cache pages of 4 tokens; the cache has 10"):
        cache.allocate(10, 8, 5)
    cache.release(group.all)
    assert sorted(cache.free) == list(range(1, 11))


@pytest.mark.parametrize("page", [1, 4, 7, 64])
def test_page_size_and_layout_change_nothing(policy, prompts, monkeypatch, page):
    expected = tokens(RolloutEngine(policy).generate(prompts, 3, SAMPLING, seed=1))
    monkeypatch.setitem(engine.PAGE_SIZE, "cpu", page)
    rollout = RolloutEngine(policy, cache_tokens=4000)
    assert tokens(rollout.generate(prompts, 3, SAMPLING, seed=1)) == expected
    assert everything_is_free(rollout)
    random.Random(0).shuffle(rollout.workspace.cache.free)
    assert tokens(rollout.generate(prompts, 3, SAMPLING, seed=1)) == expected


@pytest.mark.parametrize("limits", [{"cache_tokens": 160}, {"max_rows": 4}, {"max_rows": 1}])
def test_groups_that_wait_for_room(policy, prompts, limits):
    """Admitted one after the other while others are half done, or only once those are finished."""
    ends = tuple(range(0, policy.head.shape[0], 5))
    hasty = type(policy)(policy.module, ends)
    many = [*prompts, *prompts[::-1]]
    expected = RolloutEngine(hasty).generate(many, 3, SAMPLING, seed=1)
    rollout = RolloutEngine(hasty, **limits)
    found = rollout.generate(many, 3, SAMPLING, seed=1)
    assert tokens(found) == tokens(expected) and everything_is_free(rollout)
    for a, b in zip(found, expected, strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.logprobs == pytest.approx(y.logprobs, abs=1e-5)
            assert x.finish_reason == y.finish_reason


@pytest.mark.parametrize("limits", [{"cache_tokens": 160}, {"max_rows": 4}, {"max_rows": 1}])
@pytest.mark.parametrize("every", [1, 2])
def test_groups_wait_behind_rows_that_end_at_once(policy, prompts, limits, every):
    """A whole admission may be over with its first token: those that wait come next all the same."""
    ends = tuple(range(0, policy.head.shape[0], every))
    hasty = type(policy)(policy.module, ends)
    many = [*prompts, *prompts[::-1], *prompts]
    for new in (1, 6):
        sampling = Sampling(max_new_tokens=new)
        expected = tokens(RolloutEngine(hasty).generate(many, 2, sampling, seed=1))
        assert all(row for group in expected for row in group)
        assert tokens(RolloutEngine(hasty, **limits).generate(many, 2, sampling, seed=1)) == expected


def test_the_cache_holds_what_can_be_in_flight(policy, prompts):
    many = [*prompts, *prompts]
    engine = RolloutEngine(policy, max_rows=4)
    engine.generate(many, 4, SAMPLING)
    page, cache = 16, engine.workspace.cache
    needs = [len(p.ids) // page + 4 * -(-(page - 1 + 12) // page) for p in many]
    assert cache.pages == max(needs), "one group at a time"


def test_pages_return_after_a_failure(policy, prompts, monkeypatch):
    rollout = RolloutEngine(policy)
    step, calls = Decoder.step, []

    def fails(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of luck")
        return step(*arguments)

    monkeypatch.setattr(Decoder, "step", fails)
    with pytest.raises(RuntimeError, match="out of luck"):
        rollout.generate(prompts, 3, SAMPLING)
    assert everything_is_free(rollout)
    assert rollout.generate(prompts, 3, SAMPLING)


def test_a_prompt_larger_than_the_cache(policy, prompts):
    with pytest.raises(UserError, match="cache pages of 16 tokens; the cache has 2"):
        RolloutEngine(policy, cache_tokens=32).generate(prompts, 4, SAMPLING)


def test_a_sampled_image_token_goes_on_as_text(policy, prompts, monkeypatch):
    """In the decoder and in the packed forward alike."""
    original, image = scheduler.linear_sample, policy.module.config.image_token_id

    def draw(hidden, head, **rng):
        token, logp = original(hidden, head, **rng)
        chosen = rng["position"] == 1
        forced = (hidden.float() @ head.t()).log_softmax(-1)[:, image]
        return torch.where(chosen, image, token), torch.where(chosen, forced, logp)

    monkeypatch.setattr(scheduler, "linear_sample", draw)
    rolled = RolloutEngine(policy).generate(prompts, 2, Sampling(max_new_tokens=6), seed=3)
    with torch.no_grad():
        scored = completion_logprobs(policy, prompts, tokens(rolled))
    for group, logps in zip(rolled, scored, strict=True):
        for completion, logp in zip(group, logps, strict=True):
            assert completion.tokens[1:2] == [image] or len(completion.tokens) == 1
            assert completion.logprobs == pytest.approx(logp.tolist(), abs=1e-5)


def test_lora_is_applied(random_path, prompts):
    policy = load_model(random_path)
    add_lora(policy, 4, 8, ["q_proj", "k_proj", "down_proj", "gate_proj"])
    before = tokens(RolloutEngine(policy).generate(prompts, 1, SAMPLING))
    for name, parameter in policy.module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    rolled = RolloutEngine(policy).generate(prompts, 2, SAMPLING)
    assert [group[:1] for group in tokens(rolled)] != before
    with torch.no_grad():
        scored = completion_logprobs(policy, prompts, tokens(rolled))
    for group, logps in zip(rolled, scored, strict=True):
        for completion, logp in zip(group, logps, strict=True):
            assert completion.logprobs == pytest.approx(logp.tolist(), abs=1e-5)


def test_the_checkpoints_sampling_settings_do_not_leak(random_path, prompts):
    policy = load_model(random_path)
    assert policy.module.generation_config.top_k == 1, "Qwen2-VL's own: nearly greedy"
    rows = RolloutEngine(policy).generate(prompts[:1], 32, Sampling(max_new_tokens=1), seed=0)[0]
    assert len({row.tokens[0] for row in rows}) > 5


def test_bf16(random_path, prompts):
    policy = load_model(random_path, "bfloat16")
    rolled = RolloutEngine(policy).generate(prompts, 2, SAMPLING, seed=0)
    with torch.no_grad():
        scored = completion_logprobs(policy, prompts, tokens(rolled))
    for group, logps in zip(rolled, scored, strict=True):
        for completion, logp in zip(group, logps, strict=True):
            mismatch = (torch.tensor(completion.logprobs) - logp).abs().mean()
            assert mismatch < 0.1


# --- warped sampling


def logits_and_processors(R=64, V=50):
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(R, 8, generator=generator), torch.randn(V, 8, generator=generator)
    history = torch.randint(V, (R, 6), generator=generator)
    seen = torch.zeros(R, V, dtype=torch.bool).scatter_(1, history, True)
    return hidden, head, history, seen


@pytest.mark.parametrize(
    "settings, processors",
    [
        ({}, []),
        ({"temperature": 0.6}, [hf.TemperatureLogitsWarper(0.6)]),
        ({"top_k": 5}, [hf.TopKLogitsWarper(5)]),
        ({"top_p": 0.7}, [hf.TopPLogitsWarper(0.7)]),
        ({"min_p": 0.2}, [hf.MinPLogitsWarper(0.2)]),
        ({"repetition_penalty": 1.5}, [hf.RepetitionPenaltyLogitsProcessor(1.5)]),
        (
            {"repetition_penalty": 0.8, "temperature": 1.4, "top_k": 20, "top_p": 0.9, "min_p": 0.1},
            [
                hf.RepetitionPenaltyLogitsProcessor(0.8),
                hf.TemperatureLogitsWarper(1.4),
                hf.TopKLogitsWarper(20),
                hf.TopPLogitsWarper(0.9),
                hf.MinPLogitsWarper(0.1),
            ],
        ),
    ],
)
def test_warps_are_transformers(settings, processors):
    """Log-probs of what is drawn, over many positions, and that nothing is drawn that transformers would forbid."""
    hidden, head, history, seen = logits_and_processors()
    expected = LogitsProcessorList(processors)(history, hidden @ head.t()).log_softmax(-1)
    drawn = set()
    for position in range(20):
        token, logp = sample_with_processors(
            hidden,
            head,
            Sampling(**settings),
            seed=torch.tensor(0),
            row_key=torch.arange(len(hidden)),
            position=torch.full((len(hidden),), position),
            eos_ids=torch.tensor([], dtype=torch.int64),
            seen=seen,
        )
        torch.testing.assert_close(logp, expected.gather(1, token[:, None])[:, 0], rtol=1e-5, atol=1e-5)
        drawn |= {(row, int(t)) for row, t in enumerate(token)}
    assert len(drawn) > 1.5 * len(hidden) and all(expected[row, t] > -torch.inf for row, t in drawn)


def test_warps_reach_the_engine(policy, prompts):
    rollout = RolloutEngine(policy)
    greedy = tokens(rollout.generate(prompts, 1, Sampling(max_new_tokens=8, greedy=True)))
    assert tokens(rollout.generate(prompts, 1, Sampling(max_new_tokens=8, top_k=1), seed=5)) == greedy
    plain = tokens(rollout.generate(prompts, 2, Sampling(max_new_tokens=8), seed=5))
    whole = Sampling(max_new_tokens=8, top_k=10**6, min_p=1e-30)
    assert tokens(rollout.generate(prompts, 2, whole, seed=5)) == plain, "the same randomness"
    for prompt, group in zip(prompts, greedy, strict=True):
        penalised = Sampling(max_new_tokens=8, greedy=True, repetition_penalty=1.8)
        ours = rollout.generate([prompt], 1, penalised)[0][0].tokens
        config = GenerationConfig(
            do_sample=False, max_new_tokens=8, repetition_penalty=1.8, eos_token_id=list(policy.eos_ids), pad_token_id=0
        )
        theirs = policy.module.generate(**inputs(prompt), generation_config=config)
        assert ours == theirs[0, len(prompt.ids) :].tolist()
        assert group


def test_no_end_before_min_new_tokens(policy, prompts):
    hasty = type(policy)(policy.module, tuple(range(0, policy.head.shape[0], 2)))
    rolled = RolloutEngine(hasty).generate(prompts, 8, Sampling(max_new_tokens=9, min_new_tokens=4))
    lengths = [len(c.tokens) for group in rolled for c in group]
    assert min(lengths) == 5 and max(lengths) <= 9
    for group in rolled:
        for completion in group:
            assert all(t % 2 for t in completion.tokens[:4])


def test_stop_texts(policy, prompts, processor):
    rollout = RolloutEngine(policy, processor)
    free = rollout.generate(prompts, 4, SAMPLING, seed=2)
    text = processor.decode(free[0][0].tokens)
    stop = text[4:6]
    stopped = rollout.generate(prompts, 4, Sampling(max_new_tokens=12, stop=(stop,)), seed=2)
    ended = 0
    for before, after in zip(free, stopped, strict=True):
        for whole, cut in zip(before, after, strict=True):
            assert whole.tokens[: len(cut.tokens)] == cut.tokens
            found = stop in processor.decode(cut.tokens)
            assert found == (cut.finish_reason == "stop" and cut.tokens[-1] not in policy.eos_ids)
            assert stop not in processor.decode(cut.tokens[:-1])
            ended += found
    assert ended
    with pytest.raises(UserError, match="needs a processor"):
        RolloutEngine(policy).generate(prompts, 1, Sampling(stop=("x",)))


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": 0},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"min_p": 2},
        {"min_new_tokens": 65},
        {"repetition_penalty": 0},
        {"temperature": float("inf")},
        {"stop": "x"},
        {"stop": ("",)},
    ],
)
def test_impossible_settings_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**bad)


def test_a_long_rollout_shows_rows_alive(policy, prompts, monkeypatch, capsys):
    monkeypatch.setattr(engine, "BAR_DELAY", 0.0)
    monkeypatch.setattr(engine, "tqdm", functools.partial(engine.tqdm, mininterval=0))
    RolloutEngine(policy).generate(prompts, 4, SAMPLING, progress=True)
    shown = capsys.readouterr().err
    assert "rows running" in shown and "token/s" in shown
