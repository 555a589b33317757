"""group_advantage against its formula in float64, and on groups that carry no signal."""

import pytest
import torch
from compare import error
from vtfast_kernels.group_advantage import group_advantage


def formula(reward: torch.Tensor, G: int, scale: str, eps: float) -> torch.Tensor:
    groups = reward.double().cpu().view(-1, G)
    centred = groups - groups.mean(1, keepdim=True)
    if scale == "none":
        return centred.flatten()
    std = groups.std(1, keepdim=True) if scale == "group" else groups.std()
    return (centred / (std + eps)).flatten()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("S, G", [(4, 2), (21, 7), (64, 8), (240, 3), (2200, 1100)])
def test_matches_the_formula(impl, device, scale, S, G):
    reward = torch.rand(S, generator=torch.Generator().manual_seed(S)).to(device) * 3 - 1
    for eps in (1e-4, 0.0):
        got = group_advantage(reward, G, scale=scale, eps=eps, impl=impl)
        assert got.dtype == torch.float32 and got.device == reward.device
        assert error(got, formula(reward, G, scale, eps)) < 1e-5


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("G", [3, 7, 8])
def test_equal_rewards_give_exactly_zero(impl, device, scale, G):
    reward = torch.full((2 * G,), 0.1, device=device)
    reward[G:] = 1.1 if scale == "group" else 0.1
    for eps in (1e-4, 0.0):
        assert (group_advantage(reward, G, scale=scale, eps=eps, impl=impl) == 0).all()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_groups_of_one_and_no_rewards(impl, device, scale):
    reward = torch.tensor([1.0, 0.0, 3.0], device=device)
    assert (group_advantage(reward, 1, scale=scale, impl=impl) == 0).all()
    assert group_advantage(reward[:1], 1, scale=scale, impl=impl).tolist() == [0.0]
    assert group_advantage(reward[:0], 4, scale=scale, impl=impl).shape == (0,)


def test_matches_trl_numbers():
    """Worked by hand: rewards 0, 1, 1, 2 have mean 1 and unbiased deviation sqrt(2/3)."""
    got = group_advantage(torch.tensor([0.0, 1.0, 1.0, 2.0]), 4)
    assert got.tolist() == pytest.approx([-1.2245949, 0.0, 0.0, 1.2245949], rel=1e-5)


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("reward", (torch.tensor([1.0, float("nan")]), 2)),
        ("reward", (torch.ones(5), 2)),
        ("reward", (torch.ones(2, 2), 2)),
        ("group_size", (torch.ones(4), 0)),
        ("group_size", (torch.ones(4), 2.0)),
        ("scale", (torch.ones(4), 2, "std")),
        ("eps", (torch.ones(4), 2, "group", -1.0)),
    ],
)
def test_bad_input_is_named(name, arguments):
    reward, group_size, *options = arguments
    with pytest.raises(ValueError, match=f"^{name}:"):
        group_advantage(reward, group_size, **dict(zip(("scale", "eps"), options, strict=False)))
