"""Packed rows: what stands where, and which groups share a pass."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtfast.cost.flops import forward_flops
from vtfast.cost.micro_batches import GroupPart, bin_pack, split_group
from vtfast.data.prompt import Prompt, mrope_positions
from vtfast.data.prompt_builder import EncodedSample
from vtfast.model.loading import load_model
from vtfast.model.packing import Pack, check_group
from vtfast.rollout import Completion
from vtfast.training.groups import Group, MicroBatch
from vtfast.training.metrics import update_flops
from vtfast.utils.errors import UserError


def text_prompt(*ids):
    mask = torch.zeros(len(ids), dtype=torch.bool)
    return Prompt(torch.tensor(ids), mrope_positions(mask, None), image_mask=mask)


def image_prompt():
    """One image of 4 x 6 patches, 6 tokens, between two words."""
    mask = torch.tensor([False, *[True] * 6, False])
    grid = torch.tensor([[1, 4, 6]])
    ids = torch.where(mask, 99, 7)
    return Prompt(ids, mrope_positions(mask, grid), torch.zeros(24, 1176), grid, image_mask=mask)


def test_a_row_by_hand():
    pack = Pack([text_prompt(1, 2, 3), image_prompt()], [[[4, 5], [6]], [[8, 9]]])
    assert pack.ids.tolist() == [1, 2, 3, 4, 5, 6, 7, *[99] * 6, 7, 8, 9]
    assert pack.num_tokens == len(pack.ids) == 16
    place, *mrope = pack.positions[:, 0].tolist()
    assert place == [0, 1, 2, 3, 4, 3, *range(8), 8, 9]
    # The image spans 2 x 3 merged tokens at position 1, text goes on at 1 + 3, completions behind that.
    assert mrope[0] == [0, 1, 2, 3, 4, 3, 0, 1, 1, 1, 1, 1, 1, 4, 5, 6]
    assert mrope[1] == [0, 1, 2, 3, 4, 3, 0, 1, 1, 1, 2, 2, 2, 4, 5, 6]
    assert mrope[2] == [0, 1, 2, 3, 4, 3, 0, 1, 2, 3, 1, 2, 3, 4, 5, 6]
    assert pack.image_index.tolist() == [7, 8, 9, 10, 11, 12]
    row = torch.arange(16.0)
    assert pack.gather_predictors(row).tolist() == [2, 3, 2, 13, 14], "each state predicts the token behind it"
    assert pack.target.tolist() == [4, 5, 6, 8, 9]
    assert pack.sequence_id.tolist() == [0, 0, 1, 2, 2] and pack.lengths == [2, 1, 2]
    layout = pack.layout
    assert layout.cu_queries.tolist() == [0, 3, 5, 6, 14, 16]
    assert layout.cu_keys.tolist() == [0, 3, 8, 12, 20, 30]
    keys = layout.gather(row).tolist()
    assert keys[:12] == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5]


def swapped_images():
    """Two images whose sizes stand in the wrong order: as many tokens in all, but not in their places."""
    mask = torch.tensor([False] + [True] * 4 + [False] + [True] * 8 + [False])
    grid = torch.tensor([[1, 4, 8], [1, 4, 4]])
    return Prompt(
        torch.where(mask, 99, 7), torch.zeros(3, 15, dtype=torch.int64), torch.zeros(48, 1176), grid, image_mask=mask
    )


def parts_of(groups, budget):
    return [
        part
        for number, (prompt, lengths) in enumerate(groups)
        for part in split_group(number, prompt, lengths, float(prompt + sum(lengths)), budget)
    ]


groups = st.lists(st.tuples(st.integers(1, 30), st.lists(st.integers(1, 40), min_size=1, max_size=5)), max_size=12)


@settings(max_examples=150, deadline=None)
@given(groups, st.integers(20, 300), st.integers(1, 4))
def test_plan_keeps_everything_within_the_budget(groups, budget, ranks):
    passes = bin_pack(parts_of(groups, budget), budget, ranks)
    assert passes and all(len(bins) == ranks for bins in passes)
    seen = [(part.group, i) for bins in passes for bin in bins for part in bin for i in part.members]
    assert sorted(seen) == [(g, i) for g, (_, n) in enumerate(groups) for i in range(len(n))]
    for bin in (bin for bins in passes for bin in bins):
        assert sum(part.tokens for part in bin) <= budget or len(bin) == 1
        for part in bin:
            prompt, lengths = groups[part.group]
            assert part.tokens == prompt + sum(lengths[i] for i in part.members)
            fits = prompt + sum(lengths) <= budget
            assert len(part.members) == len(lengths) if fits else True, "split without need"
    if sum(prompt + sum(lengths) for prompt, lengths in groups) <= budget:
        assert len(passes) == 1


def test_plan_balances_the_ranks_of_a_pass():
    """Eight groups of very different sizes over four ranks: no rank has much more than the others."""
    costs = [100, 90, 60, 55, 50, 20, 15, 10]
    parts = [GroupPart(i, (0,), cost, float(cost)) for i, cost in enumerate(costs)]
    ((*bins,),) = bin_pack(parts, 400, 4)
    loads = [sum(part.cost for part in bin) for bin in bins]
    assert sum(loads) == 400 and max(loads) <= 115
    by_cost = [GroupPart(i, (0,), 10, cost) for i, cost in enumerate([1.0, 1.0, 1.0, 3.0])]
    ((*bins,),) = bin_pack(by_cost, 100, 2)
    assert [sum(part.cost for part in bin) for bin in bins] == [3, 3], "cost, not tokens"
    assert bin_pack([], 100, 3) == [[[], [], []]], "ranks without work still take part in the step"


def test_bins_of_a_pass_are_alike():
    """Ranks wait for each other in every pass."""
    sizes = [(90, 10.0), (50, 5.0), (45, 4.0), (45, 4.0), (45, 4.0)]
    parts = [GroupPart(i, (0,), tokens, cost) for i, (tokens, cost) in enumerate(sizes)]
    costs = [[sum(p.cost for p in bin) for bin in bins] for bins in bin_pack(parts, 100, 2)]
    assert costs == [[10, 8], [5, 4]]


def test_a_group_above_the_budget_repeats_its_prompt():
    parts = split_group(3, 10, [5, 5, 5, 50], 75.0, 22)
    assert [part.members for part in parts] == [(0, 1), (2,), (3,)]
    assert [part.tokens for part in parts] == [20, 15, 60]
    assert [part.cost for part in parts] == pytest.approx([20, 15, 60])


def test_check_group_names_what_is_wrong():
    prompt = image_prompt()
    check_group(prompt, [[1, 2]], 100, limit=8)
    with pytest.raises(UserError, match="8 tokens, the limit is 7"):
        check_group(prompt, [], 100, limit=7)
    with pytest.raises(UserError, match="no tokens"):
        check_group(prompt, [[1], []], 100)
    for ids in ([100], [-1]):
        with pytest.raises(UserError, match="outside the vocabulary"):
            check_group(prompt, [ids], 100)
    prompt.image_mask[0] = True
    with pytest.raises(UserError, match="placeholders for 7 image tokens, its images make 6"):
        check_group(prompt, [], 100)
    prompt.image_mask[0] = False
    prompt.ids[0] = 100
    with pytest.raises(UserError, match="the prompt has ids outside the vocabulary"):
        check_group(prompt, [], 100)
    prompt.ids[0] = 7
    with pytest.raises(UserError, match="the prompt is empty"):
        check_group(text_prompt(), [], 100)
    with pytest.raises(UserError, match=r"placeholders for 4 \+ 8 image tokens, its images make 8 \+ 4"):
        check_group(swapped_images(), [], 100)
    prompt.pixels = prompt.pixels[:20]
    with pytest.raises(UserError, match="20 patches, their sizes require 24"):
        check_group(prompt, [], 100)


def test_flops_of_qwen2_vl_2b():
    """2.62 GFLOP a token in the trunk, 0.467 at the head: the figures that the model's sizes give by hand."""
    from transformers import Qwen2VLConfig

    config = Qwen2VLConfig(
        text_config=dict(
            hidden_size=1536,
            intermediate_size=8960,
            num_hidden_layers=28,
            num_attention_heads=12,
            num_key_value_heads=2,
            vocab_size=151936,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        ),
        vision_config=dict(depth=32, embed_dim=1280, num_heads=16, mlp_ratio=4, hidden_size=1536),
    )
    flops = forward_flops(config, 612, [700] * 8, [2048])
    assert flops.decoder / (612 + 5600) == pytest.approx(2.62e9, rel=0.005)
    assert flops.head / 5600 == pytest.approx(0.467e9, rel=0.005)
    # 3 * 4 / 2 pairs of the prompt, 2 * 3 + 3 and 3 + 1 of the completions; q k and p v are 2 FLOPs each.
    assert forward_flops(config, 3, [2, 1]).attention == 4 * 19 * 28 * 1536
    # 32 blocks of 12 E^2 weights a patch, 512 merged tokens through 33 M more, quadratic attention.
    assert flops.vision == pytest.approx(3.30e12, rel=0.05)


@pytest.mark.parametrize(
    "freeze, trunk, head, vision",
    [([], 3, 3, 3), (["vision"], 3, 3, 0), (["language"], 2, 2, 3), (["embeddings"], 3, 2, 3)],
)
def test_an_update_costs_less_where_parts_are_frozen(random_path, prompts, freeze, trunk, head, vision):
    policy = load_model(random_path, freeze=freeze)
    group = Group(
        EncodedSample(None, prompts[0]), [Completion([5, 6], [0.0] * 2, "stop")] * 2, advantage=torch.zeros(2)
    )
    batch = MicroBatch([GroupPart(7, (1,), 0, 0.0)], {7: group}, policy)  # one of the two: the other is on another rank
    patches = prompts[0].grid.prod(-1).tolist()
    flops = forward_flops(policy.module.config, len(prompts[0].ids), [2], patches)
    expected = trunk * flops.decoder + 3 * flops.attention + head * flops.head + vision * flops.vision
    assert update_flops(policy, [batch]) == pytest.approx(expected)
