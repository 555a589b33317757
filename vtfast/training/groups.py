"""A question, its G answers, and what became of them: the unit that the trainer moves around."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vtfast.cost.micro_batches import GroupPart
from vtfast.data.prompt_builder import EncodedSample
from vtfast.model.packing import Pack
from vtfast.model.policy import Policy
from vtfast.rewards import RewardInput
from vtfast.rewards.manager import RewardManager
from vtfast.rollout import Completion


@dataclass
class Group:
    """One question with its G answers and what became of them. Lists and tensors run over the G."""

    question: EncodedSample
    completions: list[Completion]
    texts: list[str] = field(default_factory=list)
    rewards: Tensor | None = None
    """[reward functions, G], unweighted."""
    failures: list[dict[str, str]] = field(default_factory=list)
    """Of each answer, the rewards that failed on it, and why."""
    total: Tensor | None = None
    """Weighted sum of the rewards [G]."""
    advantage: Tensor | None = None
    scores: dict[str, list[Tensor]] = field(default_factory=dict)
    """Log-probs of each answer, by whose they are: "reference", and "old" (the policy's when it answered)."""

    @property
    def tokens(self) -> list[list[int]]:
        return [completion.tokens for completion in self.completions]

    @property
    def lengths(self) -> list[int]:
        return [len(completion.tokens) for completion in self.completions]


@dataclass
class MicroBatch:
    """The groups, or parts of groups, that one rank handles in one pass. Sequences run over parts, then members."""

    parts: Sequence[GroupPart]
    groups: dict[int, Group]
    """By `GroupPart.group`."""
    policy: Policy

    @functools.cached_property
    def pack(self) -> Pack:
        return self.policy.pack(
            [self.groups[part.group].question.prompt for part in self.parts],
            [[self.groups[part.group].tokens[i] for i in part.members] for part in self.parts],
        )

    @property
    def sequences(self) -> list[tuple[Group, int]]:
        return [(self.groups[part.group], i) for part in self.parts for i in part.members]

    def advantage(self) -> Tensor:
        """[S]"""
        return torch.stack([group.advantage[i] for group, i in self.sequences])

    def sampled(self) -> Tensor:
        """The sampler's own log-probs [N]."""
        return torch.tensor([x for group, i in self.sequences for x in group.completions[i].logprobs])

    def logps(self, whose: str) -> Tensor | None:
        """Log-probs [N] that `write` has left; None where there are none."""
        if not all(whose in group.scores for group, _ in self.sequences):
            return None
        return torch.cat([group.scores[whose][i] for group, i in self.sequences])

    def write(self, whose: str, logps: Sequence[Tensor]) -> None:
        for (group, i), logp in zip(self.sequences, logps, strict=True):
            group.scores.setdefault(whose, [logp.new_empty(0)] * len(group.completions))[i] = logp


def reward(groups: Sequence[Group], scorer: RewardManager, prefix: str = "", progress: bool = False) -> None:
    """Give every answer of the groups its rewards. `prefix`: what the prompts had already written of the answers."""
    responses = [
        RewardInput(text, group.question.sample, len(completion.tokens), prefix)
        for group in groups
        for text, completion in zip(group.texts, group.completions, strict=True)
    ]
    table = scorer.score(responses, progress)
    start = 0
    for group in groups:
        place = slice(start, start := start + len(group.texts))
        scores = [row[place] for row in table]
        group.rewards = torch.tensor([[score.value for score in row] for row in scores])
        group.failures = [
            {name: score.failure for name, score in zip(scorer.names, column, strict=True) if score.failure}
            for column in zip(*scores, strict=True)
        ]
