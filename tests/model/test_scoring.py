"""Packed log-probs and their gradients against Hugging Face's own forward, one completion at a time, nothing shared."""

import copy

import pytest
import torch
from hugging_face import COMPLETIONS, flat, logprobs, plain

from vtfast.model import attention
from vtfast.model.adapters import add_lora
from vtfast.model.loading import load_model
from vtfast.scoring import completion_logprobs
from vtfast.utils.errors import UserError


def oracle(policy, prompts, completions=COMPLETIONS, temperature=1.0) -> torch.Tensor:
    return torch.cat(
        [
            logprobs(policy, prompt, tokens, temperature)
            for prompt, group in zip(prompts, completions, strict=True)
            for tokens in group
        ]
    )


def gradients(policy, logp) -> dict[str, torch.Tensor]:
    """Of a weighted sum, so that no two tokens can be mistaken for each other."""
    policy.module.zero_grad()
    (logp.double() * torch.linspace(-1, 2, len(logp), dtype=torch.float64)).sum().backward()
    found = {n: p.grad.clone() for n, p in policy.module.named_parameters() if p.grad is not None}
    policy.module.zero_grad()
    return found


def assert_same_gradients(policy, prompts, completions=COMPLETIONS, judge=None, **options) -> None:
    """Every trained parameter's gradient, within 1e-4 of its norm. `judge`: the oracle's own model, if another."""
    judge = judge or policy
    ours = completion_logprobs(policy, prompts, completions, **options)
    ours = gradients(policy, flat(ours))
    theirs = gradients(judge, oracle(judge, prompts, completions))
    trained = {n for n, p in policy.module.named_parameters() if p.requires_grad}
    assert set(theirs) <= trained and set(ours) <= trained and theirs
    for name in trained:
        expected = theirs.get(name)
        if expected is None:  # no image: nothing there, zeros here
            assert not ours[name].any(), name
            continue
        error = (ours[name] - expected).norm() / expected.norm().clamp(min=1e-6)
        assert error < 1e-4, (name, float(error))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("token_budget", [None, 40, 1])
def test_equals_hugging_face(policy, prompts, temperature, token_budget):
    """All groups in one row; a row or so each; and every completion in a row with its own copy of the prompt."""
    options = {"temperature": temperature, "token_budget": token_budget}
    with torch.no_grad():
        ours = completion_logprobs(policy, prompts, COMPLETIONS, **options)
        expected = oracle(policy, prompts, temperature=temperature)
    assert [[len(x) for x in group] for group in ours] == [[len(x) for x in g] for g in COMPLETIONS]
    torch.testing.assert_close(flat(ours).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("token_budget", [None, 40])
def test_gradients_equal_hugging_faces(policy, prompts, token_budget):
    assert_same_gradients(policy, prompts, token_budget=token_budget)


@pytest.mark.parametrize("prompt, group", [(0, [[5]]), (2, [[5, 6]]), (1, [[5]] * 8)])
def test_gradients_of_single_groups(policy, prompts, prompt, group):
    """G = 1 with one token, text alone, and eight equal completions of one token with two images."""
    assert_same_gradients(policy, [prompts[prompt]], [group])


def test_gradients_under_checkpointing(random_path, prompts):
    policy = load_model(random_path)
    policy.module.train()
    policy.module.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    policy.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    flat(completion_logprobs(policy, prompts, COMPLETIONS)).sum().backward()
    assert len(calls) == 2, "the layer is run again in the backward pass"
    assert_same_gradients(policy, prompts, judge=load_model(random_path))


@pytest.mark.parametrize("freeze", [["vision"], ["language"], ["merger"], ["vision", "merger"], ["embeddings"]])
@pytest.mark.parametrize("remember", [False, True])
def test_gradients_under_frozen_parts(random_path, prompts, freeze, remember):
    policy = load_model(random_path, freeze=freeze)
    if not remember:
        return assert_same_gradients(policy, prompts)
    with policy.cache_image_features():
        completion_logprobs(policy, prompts, COMPLETIONS)  # fills the memory
        assert_same_gradients(policy, prompts)


def test_gradients_under_lora(random_path, prompts):
    policy = load_model(random_path)
    add_lora(policy, 4, 8, ["q_proj", "v_proj", "down_proj"])
    for name, parameter in policy.module.named_parameters():
        if "lora_B" in name:  # adapters start at zero, where half of their gradients are zero too
            torch.nn.init.normal_(parameter, std=0.1)
    assert_same_gradients(policy, prompts)
    with torch.no_grad():
        adapted = flat(completion_logprobs(policy, prompts, COMPLETIONS))
        base = flat(completion_logprobs(load_model(random_path), prompts, COMPLETIONS))
    assert (adapted - base).abs().max() > 0.01


def test_every_token_once_and_every_image_once(policy, prompts):
    """Counted where the work happens: rows of the first trunk layer, patches of the first vision block."""
    counted = {"trunk": [], "vision": [], "tower": 0}

    def count(name):
        return lambda module, args, kwargs, out: counted[name].append(args[0].shape[-2])

    def tower(*_):
        counted["tower"] += 1

    hooks = [
        policy.language_model.layers[0].register_forward_hook(count("trunk"), with_kwargs=True),
        policy.vision.module.blocks[0].register_forward_hook(count("vision"), with_kwargs=True),
        policy.vision.module.register_forward_hook(tower),
    ]
    with torch.no_grad():
        completion_logprobs(policy, prompts, COMPLETIONS)
    for hook in hooks:
        hook.remove()
    tokens = sum(len(c) for group in COMPLETIONS for c in group)
    assert counted["trunk"] == [sum(len(prompt.ids) for prompt in prompts) + tokens]
    assert counted["vision"] == [sum(len(p.pixels) for p in prompts if p.pixels is not None)]
    assert counted["tower"] == 1


def test_rows_stay_within_the_token_budget(policy, prompts):
    rows = []
    hook = policy.language_model.layers[0].register_forward_hook(
        lambda module, args, kwargs, out: rows.append(args[0].shape[-2]), with_kwargs=True
    )
    budget = max(len(prompt.ids) for prompt in prompts) + 5
    with torch.no_grad():
        completion_logprobs(policy, prompts, [[[5] * 4] * 3] * 4, token_budget=budget)
    hook.remove()
    assert len(rows) > 4 and max(rows) <= budget


def test_images_go_through_our_attention_together(policy, prompts, monkeypatch):
    """One call a block for all images, and not one an image."""
    layouts, original = [], attention.packed_attention

    def watched(query, key, value, layout, *rest):
        layouts.append(layout)
        return original(query, key, value, layout, *rest)

    monkeypatch.setattr(attention, "packed_attention", watched)
    policy.module.set_attn_implementation("sdpa")
    with torch.no_grad():
        completion_logprobs(policy, prompts, COMPLETIONS)
    assert sum(not layout.causal for layout in layouts) == len(policy.vision.module.blocks)


def test_only_completion_tokens_meet_the_vocabulary(policy, prompts, monkeypatch):
    from vtfast import scoring

    rows = []

    def watched(hidden, *args, **kwargs):
        rows.append(len(hidden))
        return original(hidden, *args, **kwargs)

    original = scoring.linear_logprob
    monkeypatch.setattr(scoring, "linear_logprob", watched)
    with torch.no_grad():
        completion_logprobs(policy, prompts, COMPLETIONS)
    assert rows == [sum(len(c) for group in COMPLETIONS for c in group)]


@pytest.mark.parametrize("token", ["image_token_id", "video_token_id", "vision_start_token_id"])
def test_a_sampled_vision_token_is_text(policy, prompts, token):
    """Hugging Face's own forward raises on it, or moves the images, so it is given embeddings instead of ids."""
    prompt, sampled = prompts[0], [5, getattr(policy.module.config, token), 6]
    ids = torch.cat([prompt.ids, torch.tensor(sampled)])
    places = torch.nonzero(prompt.image_mask).squeeze(1)
    later = int(prompt.positions.max()) + 1 + torch.arange(3).expand(3, -1)
    with torch.no_grad(), plain(policy) as module:
        embeddings = module.get_input_embeddings()(ids)
        embeddings[places] = module.model.visual(prompt.pixels, grid_thw=prompt.grid).pooler_output
        logits = module(
            inputs_embeds=embeddings[None],
            position_ids=torch.cat([prompt.positions, later], dim=1)[:, None],
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        ).logits[0, len(prompt.ids) - 1 : -1]
    expected = logits.log_softmax(-1)[range(3), sampled]
    with torch.no_grad():
        ours = completion_logprobs(policy, prompts, [[sampled, [5]], [[7]], [], [sampled]])
    torch.testing.assert_close(ours[0][0], expected, rtol=1e-5, atol=1e-5)
    if token == "image_token_id":
        with pytest.raises(ValueError, match="do not match"):
            logprobs(policy, prompts[0], sampled)


def test_sliding_windows(tmp_path, prompts):
    """A model whose upper layers see a few tokens back only: completions see the prompt's last ones, as in one row."""
    from vtfast.model.tiny_model import random_model, write_folder

    module = random_model(3)
    text = module.config.text_config
    text.use_sliding_window, text.sliding_window, text.max_window_layers = True, 6, 1
    text.layer_types = ["full_attention", "sliding_attention", "sliding_attention"]
    write_folder(tmp_path / "sliding", module)
    policy = load_model(tmp_path / "sliding")
    assert policy.language_model.layers[1].self_attn.sliding_window == 6
    with torch.no_grad():
        ours = flat(completion_logprobs(policy, prompts, COMPLETIONS))
        torch.testing.assert_close(ours.double(), oracle(policy, prompts), rtol=1e-5, atol=1e-5)
    assert_same_gradients(policy, prompts[:1], COMPLETIONS[:1])


def test_a_completion_does_not_see_its_neighbours(policy, prompts):
    alone = completion_logprobs(policy, prompts[:1], [[[5, 6, 7]]])[0][0]
    together = completion_logprobs(policy, prompts, COMPLETIONS)[0][0]
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


def test_the_same_call_twice_is_bitwise_equal(policy, prompts):
    def run():
        logp = flat(completion_logprobs(policy, prompts, COMPLETIONS))
        return [logp.detach(), *gradients(policy, logp).values()]

    assert all(a.equal(b) for a, b in zip(run(), run(), strict=True))


def test_what_cannot_be_scored_is_named(policy, prompts):
    with pytest.raises(UserError, match="prompt 1: a completion has no tokens"):
        completion_logprobs(policy, prompts[:2], [[[5]], [[]]])
    with pytest.raises(UserError, match="prompt 0: a completion has ids outside the vocabulary"):
        completion_logprobs(policy, prompts[:1], [[[400]]])
    broken = copy.copy(prompts[0])
    broken.image_mask = torch.zeros_like(broken.image_mask)
    with pytest.raises(UserError, match="prompt 1: the prompt has placeholders for 0 image tokens"):
        completion_logprobs(policy, [prompts[2], broken], [[[5]], [[5]]])
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        completion_logprobs(policy, prompts[:2], [[[5]]])
    assert completion_logprobs(policy, prompts[:2], [[], []]) == [[], []]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_arrive_in_one_order(random_path, prompts, checkpointing):
    """ZeRO reduces gradients in the order in which they arrive, on every rank its own: with images or without, the same
    weights must come in the same order, or ranks would add one weight's gradient to another's."""
    policy = load_model(random_path)
    if checkpointing:
        policy.module.train()
        policy.module.gradient_checkpointing_enable({"use_reentrant": False})
    arrived = []
    for name, parameter in policy.module.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))

    def order(*which):
        arrived.clear()
        chosen = [prompts[i] for i in which]
        scores = completion_logprobs(policy, chosen, [[[5, 6], [7]]] * len(chosen))
        flat(scores).sum().backward()
        return list(arrived)

    expected = order(0)
    assert set(expected) == {name for name, _ in policy.module.named_parameters()}
    assert order(2) == order(1, 2, 3) == expected
    policy.module.zero_grad()
    order(2)
    assert all(not p.grad.any() for p in policy.vision.module.parameters()), "no image: zeros"
