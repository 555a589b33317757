"""Which fault strikes which run where: a function of the seed and the trial's number, and of nothing else."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .damage import DAMAGES
from .places import MAIN_ONLY, Moment
from .runs import SETTINGS, Settings

TIMER = "timer"


@dataclass(frozen=True)
class Kind:
    """A fault by name."""

    name: str
    place: str
    """One of `places.PLACES`, or TIMER: all ranks are killed from outside after a time drawn at random."""
    action: str = "SIGKILL"
    damage: str | None = None
    """One of `damage.DAMAGES`, done to the newest checkpoint after the kill."""
    needs_limit: bool = False
    """Only where old checkpoints are dropped."""


KINDS = (
    Kind("rollout", "rollout"),
    Kind("backward", "backward"),
    Kind("optimizer step", "optimizer"),
    Kind("SIGTERM in rollout", "rollout", "SIGTERM"),
    Kind("opening a checkpoint's file", "open"),
    Kind("half-written file", "fsync", "tear"),
    Kind("between write and fsync", "fsync"),
    Kind("before the rename", "rename"),
    Kind("after the rename", "renamed"),
    Kind("dropping an old checkpoint", "drop", needs_limit=True),
    Kind("torn log line", "log", "tear"),
    Kind("SIGTERM in backward", "backward", "SIGTERM"),
    Kind("SIGTERM while writing", "fsync", "SIGTERM"),
    Kind("SIGTERM, then SIGKILL", "rollout", "impatient"),
    Kind("timer", TIMER),
    *(Kind(name, "rollout", damage=name) for name in DAMAGES),
)
CRASHES = tuple(kind for kind in KINDS if kind.action == "SIGKILL" and not kind.damage)
"""What may strike the resumed run again."""
LAUNCHER = ("rollout", "SIGTERM in rollout", "flipped bit")
"""Kinds whose first trial on two ranks runs under DeepSpeed's own launcher."""


@dataclass(frozen=True)
class Trial:
    number: int
    kind: Kind
    settings: Settings
    seed: str
    """Of everything that this trial leaves to chance."""
    launcher: bool = False

    def chance(self, what: object) -> random.Random:
        return random.Random(f"{self.seed}/{what}")

    @property
    def again(self) -> Kind | None:
        """What strikes the resumed run, in half of the trials."""
        chance = self.chance("again")
        possible = [kind for kind in CRASHES if not kind.needs_limit or self.settings.limit]
        return chance.choice(possible) if chance.random() < 0.5 and not self.launcher else None

    def moment(self, kind: Kind, start: int, counts: Mapping[str, Mapping[int, int]]) -> Moment:
        """Where `kind` strikes at the `start`-th start, from 0.

        `counts[place][rank]`: visits in an uninterrupted run."""
        chance = self.chance(start)
        place = kind.place
        ranks = sorted(counts[place])
        struck = chance.choice([*ranks, None] if len(ranks) > 1 else ranks)
        if place in MAIN_ONLY:
            struck = 0
        most = min(counts[place][rank] for rank in (ranks if struck is None else [struck]))
        first, last = (0.5, 0.9) if kind.damage else (0.0, 1.0)
        if start:  # much is done by now
            last = 0.3
        nth = 1 + int(most * chance.uniform(first, last))
        notify = "parent" if self.launcher else "self"
        return Moment(place, min(nth, most), kind.action, struck, chance.random(), notify)


def plan(trials: int, seed: int, ranks: Sequence[int]) -> list[Trial]:
    """Every kind as often as any other (but for one), on each number of ranks in turn."""
    chance = random.Random(f"{seed}/plan")
    order = list(KINDS)
    chance.shuffle(order)
    result: list[Trial] = []
    for number in range(trials):
        turn, place = divmod(number, len(order))
        kind, wanted = order[place], ranks[(place + turn) % len(ranks)]
        possible = [s for s in SETTINGS if s.ranks == wanted and (s.limit or not kind.needs_limit)]
        settings = chance.choice(possible)
        launcher = (
            wanted > 1
            and kind.name in LAUNCHER
            and not any(trial.launcher and trial.kind is kind for trial in result)
        )
        result.append(Trial(number, kind, settings, f"{seed}/{number}", launcher))
    return result
