"""Is the learning real? The demo as it ships, and two controls that must not learn as much. Minutes each."""

import re

import pytest
import torch

from vtfast.config import load_config
from vtfast.trainer import Trainer

pytestmark = pytest.mark.slow
KIND = re.compile(r"^(count|depth|distance|relation) +([\d.]+) -> ([\d.]+) .* ([\d.]+) -> ([\d.]+) +[\d.]+ -> ", re.M)
HELD_OUT = re.compile(r"held-out (\w+): ([\d.]+) -> ([\d.]+)  \(sampled; greedy ([\d.]+) -> ([\d.]+)\)")


def learn(trainer_class, tmp_path, capsys, **overrides) -> dict[str, tuple[float, float, float, float]]:
    """A run of the embedded default; (sampled before, after, greedy before, after): "accuracy" and "format" of all
    questions, and the accuracy of each kind by its name."""
    config = load_config(overrides={"output_dir": str(tmp_path / "run"), **overrides})
    trainer_class(config).run()
    table = capsys.readouterr().out
    print(table)  # for `pytest -rP`
    found = HELD_OUT.findall(table) + KIND.findall(table)
    return {name: tuple(map(float, values)) for name, *values in found}


class ShuffledRewards(Trainer):
    """Every completion gets the rewards of another one, drawn over the whole step."""

    def compare(self, groups):
        rewards = torch.cat([group.rewards for group in groups], dim=1)
        mixed = rewards[:, torch.randperm(rewards.shape[1])].split(self.config.num_generations, dim=1)
        for group, share in zip(groups, mixed, strict=True):
            group.rewards = share
        super().compare(groups)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_demo_learns(seed, tmp_path, capsys):
    result = learn(Trainer, tmp_path, capsys, seed=seed)
    before, after, greedy_before, greedy_after = result["accuracy"]
    assert greedy_after >= 0.90 and greedy_after - greedy_before >= 0.30
    assert after - before >= 0.50
    assert min(result["format"][1], result["format"][3]) >= 0.97
    kinds = [values for name, values in result.items() if name not in ("accuracy", "format")]
    assert len(kinds) == 4
    for before, after, greedy_before, greedy_after in kinds:
        assert after >= before and greedy_after >= greedy_before, "no kind of question may fall"


def test_shuffled_rewards_teach_nothing(tmp_path, capsys):
    result = learn(ShuffledRewards, tmp_path, capsys)
    before, after, greedy_before, greedy_after = result["accuracy"]
    assert after - before < 0.10 and greedy_after - greedy_before < 0.10


def test_the_format_reward_alone_teaches_much_less(tmp_path, capsys):
    result = learn(Trainer, tmp_path, capsys, reward_funcs="format")
    assert result["format"][1] >= 0.97
    assert result["accuracy"][3] - result["accuracy"][2] < 0.20
