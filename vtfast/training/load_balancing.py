"""Redistributes the groups of a step over the ranks, so that every rank has about the same FLOPs.

Ranks exchange sizes first. A group that moves to another rank is sent as its tokens and advantages; the other rank
builds its prompt from the data again, images included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vtfast.cost.micro_batches import GroupPart, GroupSize, plan_micro_batches
from vtfast.data.prompt_builder import EncodedSample
from vtfast.distributed.ranks import Ranks
from vtfast.model.policy import Policy
from vtfast.training.groups import Group, MicroBatch


@dataclass(frozen=True)
class StepBatches:
    """What one rank trains on in an optimizer step."""

    micro_batches: list[MicroBatch]
    """All ranks have equally many; some may be empty."""
    num_sequences: int
    """Completions on all ranks, skipped groups included. A loss denominator."""
    num_tokens: int
    """Tokens of those completions. A loss denominator."""
    skipped: float
    """Fraction of the groups that no rank trains on, because their advantages are all 0."""


def size_of(group: Group, skip_without_signal: bool) -> GroupSize:
    prompt = group.prompt
    trained = bool((group.advantage != 0).any()) or not skip_without_signal
    return GroupSize(len(prompt.ids), group.lengths, prompt.patches, trained)


def balance(
    groups: Sequence[Group],
    ranks: Ranks,
    policy: Policy,
    encode: Callable[[int], EncodedSample],
    token_budget: int,
    skip_without_signal: bool,
) -> StepBatches:
    """Distribute the groups of all ranks, and cut each rank's into micro-batches of at most `token_budget` tokens.
    Collective.

    Args:
        encode: index of a sample -> its encoded sample.
        skip_without_signal: skip groups whose advantages are all 0. Exact if only the advantage makes a gradient, that
            is with beta = 0."""
    everyone = ranks.gather([size_of(group, skip_without_signal) for group in groups])
    sizes = [size for part in everyone for size in part]
    owners = [rank for rank, part in enumerate(everyone) for _ in part]
    costs = [size.flops(policy.module.config).total for size in sizes]
    steps = [assign_to_ranks(bins, owners) for bins in plan_micro_batches(sizes, costs, token_budget, ranks.size)]
    first = sum(len(part) for part in everyone[: ranks.rank])
    local = _exchange(dict(enumerate(groups, first)), steps, owners, ranks, encode)
    return StepBatches(
        [MicroBatch(bins[ranks.rank], local, policy) for bins in steps],
        num_sequences=sum(len(size.lengths) for size in sizes),
        num_tokens=sum(sum(size.lengths) for size in sizes),
        skipped=sum(not size.trained for size in sizes) / max(1, len(sizes)),
    )


def assign_to_ranks(bins: Sequence[list[GroupPart]], owners: Sequence[int]) -> list[list[GroupPart]]:
    """The bins of one micro-batch in rank order. As many tokens as possible stay on the rank that sampled them."""
    candidates = sorted(
        (
            (-sum(part.tokens for part in bin if owners[part.group] == rank), b, rank)
            for b, bin in enumerate(bins)
            for rank in range(len(bins))
        )
    )
    assigned: dict[int, int] = {}
    for _, b, rank in candidates:
        if b not in assigned.values() and rank not in assigned:
            assigned[rank] = b
    return [bins[assigned[rank]] for rank in range(len(bins))]


def _exchange(
    mine: dict[int, Group],
    steps: Sequence[Sequence[Sequence[GroupPart]]],
    owners: Sequence[int],
    ranks: Ranks,
    encode: Callable[[int], EncodedSample],
) -> dict[int, Group]:
    """Groups of this rank by number, with those that it receives from other ranks. `steps`: [micro-batch][rank]."""
    if ranks.size == 1:
        return mine
    moving = {
        part.group for bins in steps for rank, bin in enumerate(bins) for part in bin if owners[part.group] != rank
    }
    sent = {
        number: (group.encoded.index, group.completions, group.advantage)
        for number, group in mine.items()
        if number in moving
    }
    received = {number: entry for part in ranks.gather(sent) for number, entry in part.items()}
    local = dict(mine)
    for bins in steps:
        for part in bins[ranks.rank]:
            if part.group not in local:
                index, completions, advantage = received[part.group]
                local[part.group] = Group(encode(index), completions, advantage=advantage)
    return local
