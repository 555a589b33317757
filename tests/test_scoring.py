"""Log-probs of completions against Hugging Face's own forward, one row at a time."""

import pytest
import torch
from hugging_face import inputs

from vtfast.errors import UserError
from vtfast.scoring import completion_logprobs

COMPLETIONS = [[[5, 6, 7], [8]], [[9, 10]], [[11, 12, 13, 14], [15, 5], [6]], [[7, 7]]]


def hugging_face_logprobs(policy, prompt, tokens, temperature):
    """The model's own forward over prompt + completion: its placeholders, its M-RoPE, its logits."""
    logits = policy.module(**inputs(prompt, tokens)).logits[0, len(prompt.ids) - 1 : -1]
    return (logits.double() / temperature).log_softmax(-1)[range(len(tokens)), tokens]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_equals_hugging_face(policy, prompts, temperature):
    ours = completion_logprobs(policy, prompts, COMPLETIONS, temperature=temperature)
    for prompt, group, logps in zip(prompts, COMPLETIONS, ours, strict=True):
        for tokens, logp in zip(group, logps, strict=True):
            expected = hugging_face_logprobs(policy, prompt, tokens, temperature)
            torch.testing.assert_close(logp.double(), expected, rtol=1e-5, atol=1e-5)


def test_gradients_equal_hugging_faces(policy, prompts):
    """Every parameter's gradient of the summed log-probs, within 1e-4 of its norm."""

    def gradients(total):
        policy.module.zero_grad()
        total.backward()
        return {name: p.grad.clone() for name, p in policy.module.named_parameters()}

    ours = completion_logprobs(policy, prompts, COMPLETIONS)
    ours = gradients(sum(logp.sum() for group in ours for logp in group))
    theirs = gradients(
        sum(
            hugging_face_logprobs(policy, prompt, tokens, 1.0).sum()
            for prompt, group in zip(prompts, COMPLETIONS, strict=True)
            for tokens in group
        )
    )
    for name, expected in theirs.items():
        error = (ours[name] - expected).norm() / expected.norm().clamp(min=1e-6)
        assert error < 1e-4, name
    policy.module.zero_grad()


def test_a_sampled_image_token_is_text(policy, prompts):
    """Hugging Face's forward raises on it ("image features and image tokens do not match")."""
    image_token = policy.module.config.image_token_id
    ((sampled, after),) = completion_logprobs(policy, prompts[:1], [[[5, image_token, 6], [5]]])
    assert torch.isfinite(sampled).all()
    torch.testing.assert_close(sampled[0], after[0])
    with pytest.raises(ValueError, match="do not match"):
        hugging_face_logprobs(policy, prompts[0], [5, image_token, 6], 1.0)


def test_a_completion_does_not_see_its_neighbours(policy, prompts):
    alone = completion_logprobs(policy, prompts[:1], [[[5, 6, 7]]])[0][0]
    together = completion_logprobs(policy, prompts, COMPLETIONS)[0][0]
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


def test_an_empty_completion_is_named(policy, prompts):
    with pytest.raises(UserError, match="prompt 1: a completion has no tokens"):
        completion_logprobs(policy, prompts[:2], [[[5]], [[]]])
    assert completion_logprobs(policy, prompts[:2], [[], []]) == [[], []]
