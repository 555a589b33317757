"""What is trained and what is not: frozen parts, adapters, the reference model."""

import copy
import sys
import types

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from vtfast.model.adapters import add_lora
from vtfast.model.loading import load_model
from vtfast.model.policy import freeze_parts
from vtfast.model.reference_model import ReferenceModel
from vtfast.model.vision import embed_patches
from vtfast.scoring import completion_logprobs
from vtfast.utils.errors import UserError

COMPLETIONS = [[[5, 6, 7], [8]], [[9, 10]]]
PARTS = {
    "vision": ("model.visual.patch_embed", "model.visual.blocks"),
    "merger": ("model.visual.merger",),
    "language": ("model.language_model", "lm_head"),
    "embeddings": ("model.language_model.embed_tokens", "lm_head"),
}


def scores(policy, prompts):
    with torch.no_grad():
        return torch.cat([x for group in completion_logprobs(policy, prompts[:2], COMPLETIONS) for x in group])


def shake(policy):
    """Move every trained weight, as training would."""
    with torch.no_grad():
        for parameter in policy.module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.parametrize("freeze", [["vision"], ["merger", "vision"], ["language"], ["embeddings"]])
def test_freeze_covers_exactly_its_parts(random_path, freeze):
    policy = load_model(random_path, freeze=freeze)
    prefixes = tuple(prefix for part in freeze for prefix in PARTS[part])
    for name, parameter in policy.module.named_parameters():
        assert parameter.requires_grad != name.startswith(prefixes), name


@pytest.mark.parametrize("part", ["language", "embeddings"])
def test_freeze_covers_an_untied_head(random_path, part):
    policy = load_model(random_path)
    policy.module.lm_head.weight = torch.nn.Parameter(policy.head.detach().clone())  # as the 7B's
    freeze_parts(policy, [part])
    assert not policy.head.requires_grad


def test_freeze_takes_one_name_and_refuses_another(random_path):
    assert load_model(random_path, freeze="vision").vision_is_frozen
    with pytest.raises(UserError, match=r"--freeze eyes: must be among .*: language, embeddings, vision, merger"):
        load_model(random_path, freeze=["eyes"])


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("freeze", [[], ["vision"], ["language"]])
def test_the_reference_stays_where_training_began(random_path, prompts, freeze, offload):
    policy = load_model(random_path, freeze=freeze)
    before = scores(policy, prompts)
    reference = ReferenceModel(policy, offload)
    shake(policy)
    with reference.policy() as model:
        after = scores(model, prompts)
        assert not any(p.requires_grad for p in model.module.parameters())
    torch.testing.assert_close(after, before)
    assert (scores(policy, prompts) - before).abs().max() > 1e-3
    frozen = {id(p) for p in policy.module.parameters() if not p.requires_grad}
    shared = {id(p) for p in reference.copy.module.parameters()}
    assert frozen <= shared, "a frozen weight is kept once"


def test_a_frozen_tower_runs_once_for_policy_and_reference(random_path, prompts):
    calls = []

    def run(policy):
        calls.clear()
        policy.vision.module.blocks[0].register_forward_hook(lambda *_: calls.append(1))
        reference = ReferenceModel(policy)
        with policy.cache_image_features():
            inside = scores(policy, prompts), scores(policy, prompts)
            with reference.policy() as model:
                other = scores(model, prompts)
        return inside, other

    frozen = load_model(random_path, freeze=["vision"])
    (first, again), other = run(frozen)
    assert len(calls) == 1 and first.equal(again) and first.equal(other)
    torch.testing.assert_close(first, scores(load_model(random_path), prompts))
    calls.clear()
    scores(frozen, prompts), scores(frozen, prompts)
    assert len(calls) == 2, "nothing is remembered outside a step"
    run(load_model(random_path))
    assert len(calls) >= 2, "a trained tower changes and is never remembered"


def test_lora_is_its_own_reference_with_the_adapter_off(random_path, prompts):
    policy = load_model(random_path)
    before = scores(policy, prompts)
    add_lora(policy, 4, 8, ["q_proj", "v_proj"])
    trained = [name for name, p in policy.module.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert policy.language_model.layers[0].self_attn.q_proj.scaling == {"default": 8 / 4}
    reference = ReferenceModel(policy)
    shake(policy)
    changed = scores(policy, prompts)
    assert (changed - before).abs().max() > 1e-3
    policy.module.train()
    with reference.policy() as model:
        assert model is policy
        torch.testing.assert_close(scores(model, prompts), before)
    assert policy.module.training and scores(policy, prompts).equal(changed), "switched on again"


def test_lora_folders_load_merged(random_path, prompts, tmp_path):
    policy = load_model(random_path)
    add_lora(policy, 4, 8, ["q_proj", "v_proj"])
    shake(policy)
    policy.module.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert not any("lora" in name for name, _ in loaded.module.named_parameters())
    assert all(p.requires_grad for p in loaded.module.parameters())
    torch.testing.assert_close(scores(loaded, prompts), scores(policy, prompts), rtol=1e-5, atol=1e-5)
    Qwen2VLForConditionalGeneration.from_pretrained(tmp_path)  # and transformers loads it too
    assert ReferenceModel(loaded).copy is not loaded, "it has no adapter that could be switched off"
    loaded.module.save_pretrained(tmp_path / "whole")
    again = load_model(tmp_path / "whole")
    torch.testing.assert_close(scores(again, prompts), scores(loaded, prompts))


@pytest.mark.parametrize(
    "targets, message",
    [
        (["lm_head"], "take no adapter"),
        (["merger.ln_q"], "is not a linear layer"),
        (["q_proj", "nothing"], "nothing: the model has no such module"),
    ],
)
def test_lora_names_a_bad_target(random_path, targets, message):
    with pytest.raises(UserError, match=message):
        add_lora(load_model(random_path), 4, 8, targets)


def test_lora_on_the_merger(random_path):
    policy = load_model(random_path)
    add_lora(policy, 4, 8, ["merger.mlp.0"])
    trained = [name for name, p in policy.module.named_parameters() if p.requires_grad]
    assert trained and all("merger.mlp.0.lora_" in name for name in trained)


def test_lora_without_peft(random_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="pip install peft"):
        add_lora(load_model(random_path), 4, 8, ["q_proj"])


def test_another_attention_cannot_slip_in(random_path, prompts):
    """With PyTorch's SDPA a packed row would let completions see each other."""
    policy = load_model(random_path)
    before = scores(policy, prompts)
    policy.module.set_attn_implementation("sdpa")
    assert scores(policy, prompts).equal(before)


def test_patches_are_embedded_by_a_matmul_and_copies_use_their_own_weights(random_path, prompts):
    patches, pixels = load_model(random_path).vision.module.patch_embed, prompts[0].pixels
    expected = patches(pixels)
    patches.forward = types.MethodType(embed_patches, patches)  # as a policy does on CUDA
    torch.testing.assert_close(patches(pixels), expected, rtol=1e-4, atol=1e-4)
    other = copy.deepcopy(patches)
    with torch.no_grad():
        patches.proj.weight.mul_(2.0)
    torch.testing.assert_close(patches(pixels), 2 * expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other(pixels), expected, rtol=1e-4, atol=1e-4)
