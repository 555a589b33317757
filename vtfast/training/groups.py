"""A prompt with its G completions, from the rollout to the update, and the micro-batches that they are cut into.

    SampledGroup    after the rollout: completions and their texts
    Group           what the update trains on: completions and their advantages
    ScoredGroup     a Group on the rank that sampled it, with the rewards behind the advantages

Shapes: G completions of a prompt, F reward functions, S sequences (completions) and N scored tokens of a micro-batch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from vtfast_kernels.group_advantage import group_advantage

from vtfast.cost.micro_batches import GroupPart
from vtfast.data import Sample
from vtfast.data.prompt import Prompt
from vtfast.data.prompt_builder import EncodedSample
from vtfast.distributed.ranks import Ranks
from vtfast.model.packing import Pack
from vtfast.model.policy import Policy
from vtfast.rewards import RewardInput
from vtfast.rewards.manager import RewardManager
from vtfast.rollout import Completion


@dataclass
class SampledGroup:
    """A prompt with its G completions. Lists run over the completions."""

    encoded: EncodedSample
    completions: list[Completion]
    texts: list[str] = field(default_factory=list)
    """Decoded completions, with the prompt's response prefix (`<think>`) prepended."""

    @property
    def sample(self) -> Sample:
        return self.encoded.sample

    @property
    def prompt(self) -> Prompt:
        return self.encoded.prompt

    @property
    def tokens(self) -> list[list[int]]:
        return [completion.tokens for completion in self.completions]

    @property
    def lengths(self) -> list[int]:
        return [len(completion.tokens) for completion in self.completions]


@dataclass(kw_only=True)
class Group(SampledGroup):
    """A prompt with its completions and their advantages."""

    advantage: Tensor
    """[G] fp32"""
    logprobs: dict[str, list[Tensor]] = field(default_factory=dict)
    """Log-probs of each completion by model: "reference", and "old" (the policy that sampled)."""


@dataclass(kw_only=True)
class ScoredGroup(Group):
    """A group with its rewards."""

    rewards: Tensor
    """[F, G], unweighted."""
    total: Tensor
    """[G], the weighted sum of the rewards."""
    failures: list[dict[str, str]]
    """For each completion the rewards that failed on it, and why."""


@dataclass
class MicroBatch:
    """Groups, or parts of groups, that one rank runs in one forward and backward. Sequences run over parts, then
    members."""

    parts: Sequence[GroupPart]
    groups: dict[int, Group]
    """By `GroupPart.group`."""
    policy: Policy

    @property
    def tokens(self) -> int:
        """Of its packed row."""
        return sum(part.tokens for part in self.parts)

    @functools.cached_property
    def pack(self) -> Pack:
        return self.policy.pack(
            [self.groups[part.group].prompt for part in self.parts],
            [[self.groups[part.group].tokens[i] for i in part.members] for part in self.parts],
        )

    @property
    def sequences(self) -> list[tuple[Group, int]]:
        return [(self.groups[part.group], i) for part in self.parts for i in part.members]

    def advantage(self) -> Tensor:
        """[S]"""
        return torch.stack([group.advantage[i] for group, i in self.sequences])

    def sampler_logprobs(self) -> Tensor:
        """[N]"""
        return torch.tensor([x for group, i in self.sequences for x in group.completions[i].logprobs])

    def logprobs(self, model: str) -> Tensor | None:
        """[N], as `set_logprobs` stored them; None if nothing was stored."""
        if not all(model in group.logprobs for group, _ in self.sequences):
            return None
        return torch.cat([group.logprobs[model][i] for group, i in self.sequences])

    def set_logprobs(self, model: str, logprobs: Sequence[Tensor]) -> None:
        """`logprobs`: a tensor for each sequence."""
        for (group, i), logp in zip(self.sequences, logprobs, strict=True):
            group.logprobs.setdefault(model, [logp.new_empty(0)] * len(group.completions))[i] = logp


@dataclass(frozen=True)
class Rewards:
    """The rewards of one group's completions."""

    values: Tensor
    """[F, G]"""
    failures: list[dict[str, str]]
    """For each completion the rewards that failed on it, and why."""


def score_completions(
    groups: Sequence[SampledGroup], scorer: RewardManager, prefix: str = "", progress: bool = False
) -> list[Rewards]:
    """Run every reward function on every completion. `prefix`: the part of a completion that the prompts wrote."""
    responses = [
        RewardInput(text, group.sample, len(completion.tokens), prefix)
        for group in groups
        for text, completion in zip(group.texts, group.completions, strict=True)
    ]
    table = scorer.score(responses, progress)  # [F][completions of all groups]
    result, start = [], 0
    for group in groups:
        members = slice(start, start := start + len(group.texts))
        scores = [row[members] for row in table]
        values = torch.tensor([[score.value for score in row] for row in scores])
        failures = [
            {name: score.failure for name, score in zip(scorer.names, column, strict=True) if score.failure}
            for column in zip(*scores, strict=True)
        ]
        result.append(Rewards(values, failures))
    return result


def with_advantages(
    groups: Sequence[SampledGroup], rewards: Sequence[Rewards], weights: Sequence[float], scale: str, ranks: Ranks
) -> list[ScoredGroup]:
    """Each completion's advantage over the other completions of its prompt. Collective.

    `weights`: of the F reward functions. `scale`: "group", "batch" (over all ranks) or "none"."""
    factors = torch.tensor(weights)
    totals = [factors @ reward.values for reward in rewards]
    everyone = ranks.gather(totals)
    if not any(everyone):
        return []
    G = len(next(total for part in everyone for total in part))
    advantages = group_advantage(torch.cat([total for part in everyone for total in part]), G, scale=scale).split(G)
    first = sum(len(part) for part in everyone[: ranks.rank])
    return [
        ScoredGroup(
            group.encoded,
            group.completions,
            group.texts,
            advantage=advantages[first + i],
            rewards=reward.values,
            total=total,
            failures=reward.failures,
        )
        for i, (group, reward, total) in enumerate(zip(groups, rewards, totals, strict=True))
    ]
