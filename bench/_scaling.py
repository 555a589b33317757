"""The model of `bench scale`: a step on n GPUs from the times of one GPU's step, link rates and drawn lengths.

    rollout    proportional to the floor of prefill and decode; a step waits for the slowest of n simulated rollouts
    score      distributed by the trainer's own `plan_micro_batches`; a micro-batch takes as long as its slowest rank
    update     the same, then: gradients all-reduced in every micro-batch, as far as the backward does not overlap;
               AdamW on 1 / n of the states, at the memory's bandwidth; trained weights gathered once

Floors are those of vtfast/cost/roofline.py. With one GPU the prediction is the measurement.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bench._cluster import Cluster
from vtfast.cost.devices import Rates
from vtfast.cost.micro_batches import GroupSize, plan_micro_batches
from vtfast.cost.roofline import ModelSize, decode_floor, optimizer_floor, prefill_floor
from vtfast.distributed.zero2 import REDUCE_BUCKET_SIZE


@dataclass(frozen=True)
class Work:
    """The work of a step."""

    weights: ModelSize
    groups: Sequence[GroupSize]
    """Groups are drawn from these, with replacement."""
    token_budget: int
    """Tokens of a micro-batch."""
    max_rows: int = 512
    """Rows that run at once."""


@dataclass(frozen=True)
class Measured:
    """Mean seconds of a step of one GPU with this many prompts."""

    prompts: int
    rollout: float
    score: float
    update: float
    rest: float = 0.0
    """Time outside rollout, score and update; the same for any number of GPUs."""
    host: float = 0.0
    """Part of the rollout outside prefill and decode; proportional to a GPU's prompts."""


@dataclass(frozen=True)
class Choices:
    """Choices of the implementation that could be changed."""

    overlap: float = 0.5
    """Fraction of the backward pass that can overlap with the reduction of gradients."""
    collective: str = "all-reduce"
    """all-reduce, the default of DeepSpeed's ZeRO-2 although a rank keeps only its own part, or reduce-scatter."""
    every_pass: bool = True
    """Whether gradients are reduced in every micro-batch, as by ZeRO-2, or once per step."""


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step on `gpus` GPUs. The parts add up to the step's mean."""

    gpus: int
    prompts: int
    """Of the step, on all GPUs."""
    rollout: float
    """The average GPU's."""
    score: float
    update: float
    """Forward and backward. This and score: as if evenly distributed."""
    optimizer: float
    waiting: float
    """For the slowest rollout, and for the slowest rank of each micro-batch."""
    reduce: float
    """Reduction of gradients, as far as it does not overlap with the backward pass."""
    gather: float
    """All-gather of the weights."""
    rest: float
    passes: float
    tokens: float
    """Completion tokens, all GPUs."""
    spread: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """p20, p50 and p80 of the step minus its mean, by the slowest rollout."""

    @property
    def step(self) -> float:
        useful = self.rollout + self.score + self.update + self.optimizer + self.rest
        return useful + self.waiting + self.reduce + self.gather

    @property
    def lost(self) -> float:
        """Share of the step that goes to communication and waiting."""
        return (self.waiting + self.reduce + self.gather) / self.step

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step


@dataclass(frozen=True)
class Shares:
    """How an update is shared out."""

    passes: float
    imbalance: float
    """What the dearest bins of all passes cost, over what bins of one size would; 1 for one GPU."""


class Model:
    """Predictions for any number of GPUs."""

    def __init__(
        self,
        work: Work,
        measured: Measured,
        rates: Rates,
        cluster: Cluster,
        choices: Choices = Choices(),
        *,
        draws: int = 512,
        seed: int = 0,
    ) -> None:
        """`draws`: rollouts that are simulated for each number of prompts; tails beyond their slowest are not seen."""
        self.work, self.measured, self.rates = work, measured, rates
        self.cluster, self.choices, self.draws, self.seed = cluster, choices, draws, seed
        self.pool = functools.cache(self._pool)
        self.shares = functools.cache(self._shares)

    def but(self, work: Work | None = None, choices: Choices | None = None) -> Model:
        """This model with other choices, or with other work for the same measurement."""
        other = Model(
            work or self.work,
            self.measured,
            self.rates,
            self.cluster,
            choices or self.choices,
            draws=self.draws,
            seed=self.seed,
        )
        other.pool = self.pool  # depends on neither
        if work is None:
            other.shares = self.shares
        return other

    def predict(self, gpus: int, prompts: int) -> Prediction:
        """`prompts`: of the whole step."""
        measured, share = self.measured, self.shares(gpus, prompts)
        each = prompts / gpus / measured.prompts
        score, update = measured.score * each, self.compute * each
        scale = (measured.rollout - measured.host) / float(self.pool(measured.prompts).mean())
        average, slowest = self.rollouts(gpus, prompts)
        p20, p50, p80 = (slowest.quantile(q) - slowest.mean for q in (0.2, 0.5, 0.8))
        return Prediction(
            gpus,
            prompts,
            rollout=average * scale + measured.host * each,
            score=score,
            update=update,
            optimizer=self.optimizer(gpus),
            waiting=(slowest.mean - average) * scale + (score + update) * (share.imbalance - 1),
            reduce=self.reduce(gpus, share.passes, update * share.imbalance),
            gather=self.cluster.all_gather(gpus, self.bytes),
            rest=measured.rest,
            passes=share.passes,
            tokens=prompts * self.tokens_a_prompt,
            spread=(p20 * scale, p50 * scale, p80 * scale),
        )

    @functools.cached_property
    def tokens_a_prompt(self) -> float:
        return sum(sum(group.lengths) for group in self.work.groups) / len(self.work.groups)

    @property
    def bytes(self) -> int:
        """Bytes of all gradients, and of the trained weights."""
        return self.work.weights.trained * self.work.weights.size

    # The rollout

    def rollouts(self, gpus: int, prompts: int) -> tuple[float, Slowest]:
        """(floor of the average GPU's rollout, of the slowest GPU's), in seconds."""
        each, more = divmod(prompts, gpus)  # `more` GPUs have one prompt more than the others
        held = [(p, ranks) for p, ranks in ((each, gpus - more), (each + 1, more)) if ranks]
        drawn = [(self.pool(p), ranks) for p, ranks in held]
        return sum(float(pool.mean()) * ranks for pool, ranks in drawn) / gpus, Slowest.of(drawn)

    def _pool(self, prompts: int) -> np.ndarray:
        """Floors in seconds of a GPU's rollout of `prompts` drawn groups: `draws` of them, fewer for many prompts,
        whose rollouts vary less and take longer to compute."""
        work, rng = self.work, np.random.default_rng([self.seed, prompts])
        floors = []
        for _ in range(min(self.draws, max(32, 4096 // max(1, prompts)))):
            groups = [work.groups[i] for i in rng.integers(len(work.groups), size=prompts)]
            floor = prefill_floor(work.weights, self.rates, groups)
            floor += decode_floor(work.weights, self.rates, groups, work.max_rows)
            floors.append(floor.seconds)
        return np.array(floors)

    # The update

    @functools.cached_property
    def costs(self) -> list[float]:
        """Forward FLOPs of each group."""
        config = self.work.weights.policy.module.config
        return [group.flops(config).total for group in self.work.groups]

    def _shares(self, gpus: int, prompts: int) -> Shares:
        """Means over a few steps; fewer for large ones, which vary less."""
        rounds = max(1, min(16, 512 // prompts))
        work, rng = self.work, np.random.default_rng([self.seed, prompts, 1])
        passes, imbalance = [], []
        for _ in range(rounds):
            drawn = rng.integers(len(work.groups), size=prompts)
            groups, costs = ([values[i] for i in drawn] for values in (work.groups, self.costs))
            bins = [
                [sum(part.cost for part in bin) for bin in bins]
                for bins in plan_micro_batches(groups, costs, work.token_budget, gpus)
            ]
            total = sum(map(sum, bins))
            passes.append(len(bins))
            imbalance.append(sum(map(max, bins)) * gpus / total if total else 1.0)
        return Shares(float(np.mean(passes)), float(np.mean(imbalance)))

    @property
    def compute(self) -> float:
        """Forward and backward of the measured update."""
        return self.measured.update - self.optimizer(1)

    def optimizer(self, gpus: int) -> float:
        return optimizer_floor(self.work.weights, self.rates, gpus).seconds

    def reduce(self, gpus: int, passes: float, compute: float) -> float:
        """Seconds of gradient reduction that nothing overlaps, for `passes` micro-batches whose forward and backward
        take `compute` seconds. The last bucket of a micro-batch never overlaps; the backward is two thirds of one."""
        cluster, size = self.cluster, self.work.weights.size
        cost = cluster.all_reduce if self.choices.collective == "all-reduce" else cluster.all_gather
        full = (self.work.weights.trained - 1) // REDUCE_BUCKET_SIZE
        last = cost(gpus, self.bytes - full * REDUCE_BUCKET_SIZE * size)
        total = full * cost(gpus, REDUCE_BUCKET_SIZE * size) + last
        hidden = self.choices.overlap * compute / passes * 2 / 3
        return (passes if self.choices.every_pass else 1) * max(last, total - hidden)


@dataclass(frozen=True)
class Slowest:
    """Distribution of the largest of independent draws from several pools of samples, computed exactly."""

    values: np.ndarray
    """The values of all pools, sorted."""
    below: np.ndarray
    """Probability that the largest draw is at most each value: the product over the draws."""

    @classmethod
    def of(cls, drawn: Sequence[tuple[np.ndarray, int]]) -> Slowest:
        """`drawn`: pools, and the number of draws from each."""
        values = np.unique(np.concatenate([pool for pool, _ in drawn]))
        each = [(np.searchsorted(np.sort(pool), values, side="right") / len(pool)) ** draws for pool, draws in drawn]
        return cls(values, np.prod(each, axis=0))

    @property
    def mean(self) -> float:
        return float(self.values @ np.diff(self.below, prepend=0.0))

    def quantile(self, q: float) -> float:
        return float(self.values[np.searchsorted(self.below, q)])


def from_there_on(predictions: Sequence[Prediction], holds: Callable[[Prediction], bool]) -> Prediction | None:
    """The prediction with the fewest GPUs such that `holds` for it and for all larger ones."""
    largest = list(itertools.takewhile(holds, reversed(predictions)))
    return largest[-1] if largest else None


def first_above(predictions: Sequence[Prediction], limit: float = 0.25) -> Prediction | None:
    """The number of GPUs from which on communication and waiting take more than `limit` of a step."""
    return from_there_on(predictions, lambda p: p.lost > limit)


def reduce_dominates(predictions: Sequence[Prediction]) -> Prediction | None:
    """The number of GPUs from which on gradients are more than half of communication and waiting."""
    return from_there_on(predictions, lambda p: p.reduce > p.waiting + p.gather)
