"""How fast a step could be at most: for each phase the time that its work takes at the device's own rates.

The floor of a piece of work is the longer of FLOPs / peak rate and bytes / bandwidth. Pieces that wait for each other
(decode steps, micro-batches) add up. Only unavoidable work counts: useful FLOPs as in `flops.py`; weights
read once for everything that can share them; keys and values read once, a prompt's once for its group. Activations may
stay in caches and count nothing, nor do rewards and other work of the host: no program quite reaches its floor.

    prefill    prompts and images once: FLOPs of `forward_flops`, one draw's head a prompt; weights once a packed row
    decode     a step: weights and head once, keys and values of the running rows; 2 FLOPs a weight and row
    score      a micro-batch and a scorer (reference, old policy): a forward; weights once
    update     a micro-batch: FLOPs of `part_update_flops`; weights in forward and backward, a gradient written
    optimizer  AdamW on this rank's share of the states: 28 bytes a trained weight, 30 for bf16 ones
    link       ZeRO-2's least: a reduce-scatter of the gradients a micro-batch, an all-gather of the weights a step,
               each (n - 1) / n of the bytes; the former beside the backward pass, whichever is longer

Ranks wait for each other after the rollout and in every micro-batch, so a phase's floor is its slowest rank's, and the
clock that it is compared with is rank 0's.
"""

from __future__ import annotations

import heapq
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from torch import nn

from vtfast.config import Config
from vtfast.cost.devices import Rates
from vtfast.cost.flops import forward_flops, part_update_flops
from vtfast.cost.micro_batches import GroupPart, GroupSize, plan_micro_batches
from vtfast.model.policy import Policy
from vtfast.model.text_shape import text_shape
from vtfast.rollout.scheduler import PREFILL_TOKENS

log = logging.getLogger("vtfast")

Cached = TypeVar("Cached", float, np.ndarray)
PHASES = ("rollout", "score", "update")
RATES = ("flops", "bandwidth", "link")
ADAMW_BYTES = 28
"""Of an fp32 weight: weight, gradient and two moments read, weight and two moments written, 4 bytes each."""


@dataclass(frozen=True)
class Floor:
    """Least seconds of some work, by what they are spent on. `+` for work one after the other."""

    compute: float = 0.0
    memory: float = 0.0
    link: float = 0.0

    @property
    def seconds(self) -> float:
        return self.compute + self.memory + self.link

    @property
    def bound(self) -> str:
        """What most of the time goes to."""
        return max(("compute", "memory", "link"), key=lambda name: getattr(self, name))

    def __add__(self, other: Floor) -> Floor:
        return Floor(self.compute + other.compute, self.memory + other.memory, self.link + other.link)

    def times(self, factor: float) -> Floor:
        return Floor(self.compute * factor, self.memory * factor, self.link * factor)


def longer(rates: Rates, flops: float, read: float) -> Floor:
    """Work of `flops` operations beside `read` bytes of memory traffic."""
    compute, memory = flops / rates.flops, read / rates.bandwidth
    return Floor(compute=compute) if compute >= memory else Floor(memory=memory)


@dataclass(frozen=True)
class ModelSize:
    """A model as far as work is concerned. The weights' values are not needed: a policy on the meta device will do."""

    policy: Policy
    decoder: int
    """Weights of the language model's layers."""
    head: int
    vision: int
    """Of the vision vision with its merger; 0 for a text model."""
    trained: int
    size: int
    """Bytes of a weight."""
    kv_bytes: int
    """Keys and values of one token in all layers."""

    @classmethod
    def of(cls, policy: Policy) -> ModelSize:
        def count(module: nn.Module | None) -> int:
            return sum(p.numel() for p in module.parameters()) if module is not None else 0

        size = policy.head.element_size()
        trained = {id(p): p for p in policy.module.parameters() if p.requires_grad}
        return cls(
            policy,
            decoder=count(policy.language_model.layers) + count(policy.language_model.norm),
            head=policy.head.numel(),
            vision=count(None if policy.vision is None else policy.vision.module),
            trained=sum(p.numel() for p in trained.values()),
            size=size,
            kv_bytes=text_shape(policy.module.config).kv_numbers * size,
        )

    def decode_bytes(self, cached: Cached) -> Cached:
        """Read by a decode step over `cached` tokens of keys and values, a shared prompt's counted once."""
        return (self.decoder + self.head) * self.size + cached * self.kv_bytes

    def forward_bytes(self, images: bool) -> int:
        """Weights that a forward reads."""
        return (self.decoder + self.head + self.vision * images) * self.size


# The rollout


def admission_steps(lengths: Sequence[Sequence[int]], max_rows: int) -> list[int]:
    """Decode steps before each group starts: in order, as soon as at most `max_rows` rows run with it.

    A completion of n tokens has its first from the prefill and takes n - 1 decode steps. The cache is no limit here."""
    starts: list[int] = []
    ends: list[int] = []
    now = 0
    for group in lengths:
        while ends and len(ends) + len(group) > max_rows:
            now = heapq.heappop(ends)
            while ends and ends[0] <= now:
                heapq.heappop(ends)
        starts.append(now)
        for n in group:
            if n > 1:
                heapq.heappush(ends, now + n - 1)
    return starts


def in_flight(groups: Sequence[GroupSize], max_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each decode step, as fp64 [steps]: rows; tokens in the cache, a prompt's once for its group; pairs of a row
    and a token that it sees."""
    starts = admission_steps([group.lengths for group in groups], max_rows)
    ends = (s + max(g.lengths) - 1 for s, g in zip(starts, groups, strict=True))
    rows, cached, pairs = np.zeros((3, max(ends, default=0)))
    for start, group in zip(starts, groups, strict=True):
        cached[start : start + max(group.lengths) - 1] += group.prompt
        for n in group.lengths:
            own = np.arange(1, n)  # tokens of its own that the row's steps see
            alive = slice(start, start + n - 1)
            rows[alive] += 1
            cached[alive] += own
            pairs[alive] += group.prompt + own
    return rows, cached, pairs


def decode_floor(weights: ModelSize, rates: Rates, groups: Sequence[GroupSize], max_rows: int = 512) -> Floor:
    """All decode steps of a rollout, each with the rows that run in it."""
    rows, cached, pairs = in_flight(groups, max_rows)
    token = forward_flops(weights.policy.module.config, 0, [1])  # and its one pair of positions
    compute = (rows * (token.decoder + token.head) + pairs * token.attention) / rates.flops
    memory = weights.decode_bytes(cached) / rates.bandwidth
    is_compute = compute >= memory
    return Floor(float(compute[is_compute].sum()), float(memory[~is_compute].sum()))


def prefill_floor(weights: ModelSize, rates: Rates, groups: Sequence[GroupSize]) -> Floor:
    """The prompts packed, images included, and one draw's head for each."""
    if not groups:
        return Floor()
    config = weights.policy.module.config
    flops = sum(group._replace(lengths=[]).flops(config).total for group in groups)
    flops += 2.0 * weights.head * len(groups)
    tokens = sum(group.prompt for group in groups)
    rows = -(-tokens // PREFILL_TOKENS)
    images = any(group.patches for group in groups)
    return longer(rates, flops, rows * weights.forward_bytes(images) + tokens * weights.kv_bytes)


# Scoring and the update


def score_floor(weights: ModelSize, rates: Rates, sizes: Sequence[GroupSize], scorers: Sequence[str]) -> Floor:
    """One micro-batch of one rank under each of `scorers`: "reference" or "old". `sizes`: its prompts, each with the
    completions that it holds.

    A frozen vision's features are there since the rollout. Of a trained one, the reference has its own copy."""
    total = Floor()
    if not sizes:
        return total
    sees = not weights.policy.vision_is_frozen
    flops = sum(
        forward_flops(weights.policy.module.config, s.prompt, s.lengths, s.patches if sees else ()).total for s in sizes
    )
    images = sees and any(size.patches for size in sizes)
    for _ in scorers:
        total += longer(rates, flops, weights.forward_bytes(images))
    return total


def micro_batch_floor(weights: ModelSize, rates: Rates, sizes: Sequence[GroupSize], ranks: int = 1) -> Floor:
    """Forward and backward of one micro-batch of one rank, its gradients reduced meanwhile."""
    if not sizes:
        return Floor()
    flops = sum(
        part_update_flops(weights.policy, size.prompt, size.lengths, size.patches, vision_cached=True) for size in sizes
    )
    images = not weights.policy.vision_is_frozen and any(size.patches for size in sizes)
    traffic = 2 * weights.forward_bytes(images) + weights.trained * weights.size
    own = longer(rates, flops, traffic)
    link = link_floor(rates, weights.trained * weights.size, ranks)
    return max(own, link, key=lambda floor: floor.seconds)


def link_floor(rates: Rates, size: float, ranks: int) -> Floor:
    """A reduce-scatter or an all-gather of `size` bytes; nothing where the link's rate is not known."""
    if ranks == 1 or rates.link is None:
        return Floor()
    return Floor(link=(ranks - 1) / ranks * size / rates.link)


def optimizer_floor(weights: ModelSize, rates: Rates, ranks: int = 1) -> Floor:
    """AdamW on one rank's share of the states (bf16 weights have fp32 masters and are written besides)."""
    each = ADAMW_BYTES + (weights.size if weights.size < 4 else 0)
    return Floor(memory=weights.trained / ranks * each / rates.bandwidth)


# A whole step


def step_floors(
    weights: ModelSize, rates: Rates, config: Config, everyone: Sequence[Sequence[GroupSize]], fresh: bool = True
) -> dict[str, Floor]:
    """Floors by phase: prefill and decode of rank 0; rollout, score and update of the slowest rank; optimizer and link
    (the all-gather) are parts of the update. `everyone`: the groups of each rank as they were answered. `fresh`: False
    for a further step on the same answers (`num_iterations`)."""
    ranks = len(everyone)
    sizes = [size for mine in everyone for size in mine]
    costs = [size.flops(weights.policy.module.config).total for size in sizes]
    micro_batches = plan_micro_batches(sizes, costs, config.tokens_per_micro_batch, ranks)
    floors: dict[str, Floor] = defaultdict(Floor)
    if fresh:
        prefill = [prefill_floor(weights, rates, mine) for mine in everyone]
        decode = [decode_floor(weights, rates, mine, config.rollout_max_rows) for mine in everyone]
        floors |= {"prefill": prefill[0], "decode": decode[0]}
        floors["rollout"] = _slowest([p + d for p, d in zip(prefill, decode, strict=True)])
        scorers = ["reference"] * (config.beta > 0) + ["old"] * (config.num_iterations > 1)
    for bins in micro_batches:
        held = [[_of_part(part, sizes) for part in parts] for parts in bins]
        if fresh:
            floors["score"] += _slowest([score_floor(weights, rates, mine, scorers) for mine in held])
        floors["update"] += _slowest([micro_batch_floor(weights, rates, mine, ranks) for mine in held])
    floors["optimizer"] = optimizer_floor(weights, rates, ranks)
    floors["link"] = link_floor(rates, weights.trained * weights.size, ranks)
    floors["update"] += floors["optimizer"] + floors["link"]
    return dict(floors)


def _slowest(floors: Sequence[Floor]) -> Floor:
    return max(floors, key=lambda floor: floor.seconds)


def _of_part(part: GroupPart, sizes: Sequence[GroupSize]) -> GroupSize:
    whole = sizes[part.group]
    return whole._replace(lengths=[whole.lengths[i] for i in part.members])
