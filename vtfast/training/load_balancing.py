"""Which rank trains on what: the groups of all ranks are shared out anew, so that no rank waits for a longer one.

Ranks first tell each other sizes alone. A group that is trained elsewhere than it was answered travels as its tokens
and advantages; its new rank asks the question again from the data, images included.
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
    """A rank's share of an optimizer step."""

    batches: list[MicroBatch]
    """One a pass; all ranks have equally many, some perhaps empty."""
    num_sequences: int
    """Completions of all ranks, those without signal included: denominators of the loss."""
    num_tokens: int
    skipped: float
    """Share of all groups that no rank trains on, since nothing can be learned from them."""


def size_of(group: Group, skip_without_signal: bool) -> GroupSize:
    prompt = group.question.prompt
    trained = bool((group.advantage != 0).any()) or not skip_without_signal
    return GroupSize(len(prompt.ids), group.lengths, prompt.patches, trained)


def share_out(
    groups: Sequence[Group],
    ranks: Ranks,
    policy: Policy,
    ask: Callable[[int], EncodedSample],
    token_budget: int,
    skip_without_signal: bool,
) -> StepBatches:
    """Collective. `ask`: index of a sample -> its question. `skip_without_signal`: leave out groups whose advantages
    are all 0; exact where nothing but the advantage makes a gradient (beta = 0)."""
    everyone = ranks.gather([size_of(group, skip_without_signal) for group in groups])
    sizes = [size for part in everyone for size in part]
    owners = [rank for rank, part in enumerate(everyone) for _ in part]
    costs = [size.flops(policy.module.config).total for size in sizes]
    passes = [settle(bins, owners) for bins in plan_micro_batches(sizes, costs, token_budget, ranks.size)]
    first = sum(len(part) for part in everyone[: ranks.rank])
    here = _exchange(dict(enumerate(groups, first)), passes, owners, ranks, ask)
    return StepBatches(
        [MicroBatch(bins[ranks.rank], here, policy) for bins in passes],
        num_sequences=sum(len(size.lengths) for size in sizes),
        num_tokens=sum(sum(size.lengths) for size in sizes),
        skipped=sum(not size.trained for size in sizes) / max(1, len(sizes)),
    )


def settle(bins: Sequence[list[GroupPart]], owners: Sequence[int]) -> list[list[GroupPart]]:
    """The bins of a pass in rank order: as many tokens as possible stay where they were answered."""
    at_home = sorted(
        (
            (-sum(part.tokens for part in bin if owners[part.group] == rank), b, rank)
            for b, bin in enumerate(bins)
            for rank in range(len(bins))
        )
    )
    placed: dict[int, int] = {}
    for _, b, rank in at_home:
        if b not in placed.values() and rank not in placed:
            placed[rank] = b
    return [bins[placed[rank]] for rank in range(len(bins))]


def _exchange(
    mine: dict[int, Group],
    passes: Sequence[Sequence[Sequence[GroupPart]]],
    owners: Sequence[int],
    ranks: Ranks,
    ask: Callable[[int], EncodedSample],
) -> dict[int, Group]:
    """Groups by number, those that came from other ranks among them."""
    if ranks.size == 1:
        return mine
    moving = {
        part.group for bins in passes for rank, bin in enumerate(bins) for part in bin if owners[part.group] != rank
    }
    sent = {
        number: (group.question.index, group.completions, group.advantage)
        for number, group in mine.items()
        if number in moving
    }
    arrived = {number: entry for part in ranks.gather(sent) for number, entry in part.items()}
    here = dict(mine)
    for bins in passes:
        for part in bins[ranks.rank]:
            if part.group not in here:
                index, completions, advantage = arrived[part.group]
                here[part.group] = Group(ask(index), completions, advantage=advantage)
    return here
