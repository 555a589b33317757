"""Which fault is injected into which run and where: a function of the seed and the trial's number alone."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .damage import DAMAGES
from .places import MAIN_ONLY, Moment
from .runs import SETTINGS, Settings

TIMER = "timer"
TIDY = 5
"""Things that a start may have to move, at least."""


@dataclass(frozen=True)
class Kind:
    """A fault by name."""

    name: str
    place: str
    """One of `places.PLACES`, or TIMER: all ranks are killed from outside after a time drawn at random."""
    action: str = "SIGKILL"
    window: tuple[float, float] = (0.0, 1.0)
    """The part of an uninterrupted run in which it is injected."""
    damage: str | None = None
    """One of `damage.DAMAGES`, done to the newest checkpoint after the kill."""
    again_at: str | None = None
    """Where a fault is injected into the next start; None: anywhere, in half of the trials."""
    needs_limit: bool = False
    """Only for runs that delete old checkpoints."""


EARLY, LATE = (0.0, 0.1), (0.5, 0.9)
"""Before the first checkpoint; with at least one."""
KINDS = (
    Kind("rollout", "rollout"),
    Kind("backward", "backward"),
    Kind("optimizer step", "optimizer"),
    Kind("opening a checkpoint's file", "open"),
    Kind("half-written file", "fsync", "tear"),
    Kind("between write and fsync", "fsync"),
    Kind("before the rename", "rename"),
    Kind("after the rename", "renamed"),
    Kind("dropping an old checkpoint", "drop", needs_limit=True),
    Kind("torn log line", "log", "tear"),
    Kind("again while going on", "rollout", window=LATE, again_at="tidy"),
    Kind("again while starting over", "rollout", window=EARLY, again_at="tidy"),
    Kind("timer", TIMER),
    Kind("SIGTERM in rollout", "rollout", "SIGTERM"),
    Kind("SIGTERM in backward", "backward", "SIGTERM"),
    Kind("SIGTERM while writing", "fsync", "SIGTERM"),
    Kind("SIGTERM, then SIGKILL", "rollout", "impatient"),
    *(Kind(name, "rollout", window=LATE, damage=name) for name in DAMAGES),
)
CRASHES = KINDS[:10]
"""What may strike the resumed run again."""
LAUNCHER = ("rollout", "SIGTERM in rollout", "flipped bit")
"""Kinds whose first trial on two ranks runs under DeepSpeed's own launcher."""


@dataclass(frozen=True)
class Trial:
    number: int
    kind: Kind
    settings: Settings
    seed: str
    """A generator for one random choice of this trial."""
    launcher: bool = False

    def chance(self, what: object) -> random.Random:
        return random.Random(f"{self.seed}/{what}")

    @property
    def faults(self) -> list[Kind]:
        """What strikes the first start, and what the next."""
        if self.kind.again_at:
            return [self.kind, Kind(self.kind.name, self.kind.again_at)]
        chance = self.chance("again")
        if self.launcher or chance.random() < 0.5:
            return [self.kind]
        possible = [kind for kind in CRASHES if self.settings.limit or not kind.needs_limit]
        return [self.kind, chance.choice(possible)]

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
        first, last = kind.window if start == 0 else (0.0, 0.3)  # much is done by then
        nth = min(1 + int(most * chance.uniform(first, last)), most)
        if place == "tidy":
            nth = chance.randint(1, TIDY)
        notify = "parent" if self.launcher else "self"
        return Moment(place, nth, kind.action, struck, chance.random(), notify)


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
            wanted > 1 and kind.name in LAUNCHER and not any(trial.launcher and trial.kind is kind for trial in result)
        )
        result.append(Trial(number, kind, settings, f"{seed}/{number}", launcher))
    return result
