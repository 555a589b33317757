"""How a step is cut into micro-batches: long groups are split, and the parts packed into bins of equal cost."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedConfig

from vtfast.cost.flops import Flops, forward_flops


class GroupSize(NamedTuple):
    """A group as far as work is concerned."""

    prompt: int
    """Tokens."""
    lengths: list[int]
    """Tokens of each completion."""
    patches: list[int]
    """Of each image."""
    trained: bool = True
    """False: left out of the update, since nothing can be learned from it."""

    def flops(self, config: PreTrainedConfig) -> Flops:
        """Of a forward."""
        return forward_flops(config, self.prompt, self.lengths, self.patches)


def plan_micro_batches(
    sizes: Sequence[GroupSize], costs: Sequence[float], token_budget: int, ranks: int
) -> list[list[list[GroupPart]]]:
    """The update of these groups, cut into micro-batches: result[micro-batch][bin], a bin for each rank.
    `GroupPart.group` is an index into `sizes`."""
    parts = [
        part
        for number, (size, cost) in enumerate(zip(sizes, costs, strict=True))
        if size.trained
        for part in split_group(number, size.prompt, size.lengths, cost, token_budget)
    ]
    return bin_pack(parts, token_budget, ranks)


@dataclass(frozen=True)
class GroupPart:
    """A prompt with all of its completions, or with some of them where all exceed the token budget."""

    group: int
    members: tuple[int, ...]
    tokens: int
    cost: float


def split_group(group: int, prompt: int, completions: Sequence[int], cost: float, budget: int) -> list[GroupPart]:
    """One part, or as many as the budget asks for, each repeating the prompt. `cost`: of the whole group. A completion
    that exceeds the budget together with its prompt is a part of its own."""
    total = prompt + sum(completions)
    shares: list[list[int]] = [[]]
    filled = prompt
    for member, length in enumerate(completions):
        if shares[-1] and filled + length > budget:
            shares.append([])
            filled = prompt
        shares[-1].append(member)
        filled += length
    parts = []
    for share in shares:
        tokens = prompt + sum(completions[i] for i in share)
        parts.append(GroupPart(group, tuple(share), tokens, cost * tokens / total))
    return parts


def bin_pack(parts: Sequence[GroupPart], budget: int, ranks: int = 1) -> list[list[list[GroupPart]]]:
    """Micro-batches, each a bin of parts for every rank: result[i][rank]. About as few as the budget allows.

    The bins of a micro-batch cost about the same, since its ranks wait for each other. A bin may be empty if there are
    fewer parts than ranks. A part larger than the budget gets a bin of its own.
    """
    micro_batches = max(1, math.ceil(sum(min(p.tokens, budget) for p in parts) / budget / ranks))
    while (bins := _fill(parts, micro_batches * ranks, budget)) is None:
        micro_batches += 1
    bins.sort(key=lambda bin: -sum(part.cost for part in bin))
    return [bins[i : i + ranks] for i in range(0, len(bins), ranks)]


def _fill(parts: Sequence[GroupPart], count: int, budget: int) -> list[list[GroupPart]] | None:
    """Longest part first into the cheapest bin with room; None if one finds no room."""
    bins: list[list[GroupPart]] = [[] for _ in range(count)]
    heap = [(0.0, i, 0) for i in range(count)]  # cost, bin, tokens
    for part in sorted(parts, key=lambda part: (-part.cost, part.group, part.members)):
        full = []
        while heap and heap[0][2] and heap[0][2] + part.tokens > budget:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        cost, i, tokens = heapq.heappop(heap)
        bins[i].append(part)
        for entry in [*full, (cost + part.cost, i, tokens + part.tokens)]:
            heapq.heappush(heap, entry)
    return bins
