"""Runs trials: start a run, inject a fault, check what is left, start the same command again, until it finishes."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from . import verify
from .damage import DAMAGES
from .launch import MARK, Ended, Launcher, journal
from .plan import TIMER, Kind, Trial
from .runs import Settings

STARTS = 6
"""Starts after which a trial is given up."""
PREEMPTED = 75
"""Exit code of a run that saved because of a SIGTERM."""


@dataclass
class Reference:
    """The uninterrupted run of a command."""

    folder: Path
    counts: dict[str, dict[int, int]]
    """Visits of each place by rank."""
    seconds: float
    """Of a forked start."""


@dataclass
class Result:
    """The result of a trial."""

    trial: Trial
    starts: int = 0
    struck: int = 0
    """Faults that were injected."""
    lost: list[str] = field(default_factory=list)
    """Checkpoints that were whole before a fault and are not after it."""
    differing: list[str] = field(default_factory=list)
    """Differences between the finished run and the uninterrupted one."""
    other: list[str] = field(default_factory=list)
    """Other problems: a start that failed by itself, a process or a file left over."""
    story: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def problems(self) -> list[str]:
        return [*self.lost, *self.differing, *self.other]


class Campaign:
    """Runs trials below `folder`. The uninterrupted run of each command is made when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.data = self.folder / "data" / "train.parquet"
        self.references: dict[str, Reference] = {}
        self.launcher = Launcher()

    def run(self, trial: Trial) -> Result:
        reference = self.reference(trial.settings)
        folder = self.folder / f"trial-{trial.number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        flags = trial.settings.flags(self.data, folder / "run")
        return _Trial(trial, folder / "run", flags, reference, self.launcher).play()

    def reference(self, settings: Settings) -> Reference:
        """An ordinary run; a forked one that nothing happens to counts the visits, and must equal it."""
        if settings.name not in self.references:
            self._render()
            folder = self.folder / f"reference-{settings.name}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            ordinary, forked = folder / "ordinary", folder / "forked"
            for run, start in ((ordinary, self.launcher.ordinary), (forked, self.launcher.forked)):
                ended = start(settings.ranks, settings.flags(self.data, run), run)
                if not ended.finished:
                    said = (folder / "output").read_text()[-3000:]
                    raise RuntimeError(f"a run without any fault ended with {ended.codes}:\n{said}")
            if different := list(verify.differences(ordinary, forked)):
                raise RuntimeError(f"{settings.name}: a forked run differs: {'; '.join(different)}")
            if not all(line["grad_norm"] for line in verify.metrics(ordinary)):
                raise RuntimeError(f"{settings.name}: a step without gradient would hide mistakes")
            counts: dict[str, dict[int, int]] = defaultdict(dict)
            for rank, place, count in _noted(forked, "counted"):
                counts[place][int(rank)] = int(count)
            self.references[settings.name] = Reference(ordinary, dict(counts), ended.seconds)
        return self.references[settings.name]

    def _render(self) -> None:
        if not self.data.exists():
            from vtfast.data.synthetic import write_dataset

            write_dataset(self.data.parent, train=20, val=1, seed=0)


class _Trial:
    """A trial that is running."""

    def __init__(self, trial: Trial, run: Path, flags: list[str], reference: Reference, launcher: Launcher) -> None:
        self.trial, self.run, self.flags = trial, run, flags
        self.reference, self.launcher = reference, launcher
        self.damaged: set[int] = set()
        """Steps whose checkpoints the trial has damaged."""
        self.dropped: set[int] = set()
        """Steps whose checkpoints were deleted for newer ones (`save_total_limit`)."""
        self.result = Result(trial)

    def play(self) -> Result:
        began, result = time.monotonic(), self.result
        faults = self.trial.faults
        ended = None
        while result.starts < STARTS and not (ended and ended.finished):
            kind = faults[result.starts] if result.starts < len(faults) else None
            if ended and result.starts > len(faults):
                break  # it failed without a fault
            before = len(_noted(self.run, "struck"))
            ended = self.start(kind)
            result.starts += 1
            struck = [" ".join(words) for words in _noted(self.run, "struck")[before:]]
            result.struck += bool(struck) or self._killed(kind, ended)
            result.story.append(
                f"start {result.starts}: {kind.name if kind else 'no fault'}; struck (rank, place, visit):"
                f" {', '.join(struck) or '-'}; exit codes {ended.codes}; whole now: {verify.whole(self.run)}"
            )
            self.look(ended, notice=bool(struck) and kind.action == "SIGTERM")
            if kind and kind.damage and not ended.finished:
                self.damage(kind.damage)
        self.look_at_the_end(ended)
        result.seconds = time.monotonic() - began
        (self.run.parent / "story").write_text("\n".join([*result.story, *result.problems, ""]))
        return result

    def start(self, kind: Kind | None) -> Ended:
        trial, number, ranks = self.trial, self.result.starts, self.trial.settings.ranks
        if kind and kind.place == TIMER:
            after = trial.chance(f"timer {number}").uniform(0, self.reference.seconds)
            return self.launcher.forked(ranks, self.flags, self.run, kill_after=after)
        moment = trial.moment(kind, number, self.reference.counts) if kind else None
        start = self.launcher.ordinary if trial.launcher else self.launcher.forked
        return start(ranks, self.flags, self.run, moment)

    def look(self, ended: Ended, notice: bool) -> None:
        """What must hold after every start, however it ended. `notice`: it was asked to stop by a SIGTERM."""
        result, number, limit = self.result, self.result.starts, self.trial.settings.limit
        whole = verify.whole(self.run)
        landed = {int(step) for (step,) in _noted(self.run, "landed")}
        for step in sorted(landed - set(whole) - self.damaged - self.dropped):
            if limit and sum(other > step for other in whole) >= limit:
                self.dropped.add(step)
                continue
            path = self.run / "checkpoints" / f"step-{step}"
            result.lost.append(f"start {number}: step-{step} is lost: {verify.problem(path)}")
        if ended.hung:
            result.other.append(f"start {number}: did not end, and was killed")
        if notice:
            self.look_at_notice(ended, whole)
        for process in verify.processes(f"{MARK}={self.run}", ended.sessions):
            result.other.append(f"start {number}: process {process} was left running")
            os.kill(process, signal.SIGKILL)

    def look_at_notice(self, ended: Ended, whole: list[int]) -> None:
        """A run that is asked to stop saves the steps that it has done and ends with PREEMPTED. The launcher has its
        own exit code."""
        result, settings = self.result, self.trial.settings
        if not self.trial.launcher and set(ended.codes) - {0, PREEMPTED}:
            result.other.append(f"start {result.starts}: exit codes {ended.codes} after a SIGTERM")
        iterations = settings.own.get("num_iterations", 1)
        done = max((line["step"] for line in verify.metrics(self.run)), default=0)
        if done - max(whole, default=0) >= iterations:
            result.lost.append(f"start {result.starts}: {done} steps done at the SIGTERM, saved: {whole}")

    def damage(self, name: str) -> None:
        """Damage the newest whole checkpoint. The next start must log that it does not resume from it."""
        whole = verify.whole(self.run)
        if not whole:
            self.result.other.append("no checkpoint to damage")
            return
        newest = whole[-1]
        chance = self.trial.chance("damage")
        done = DAMAGES[name](self.run / "checkpoints" / f"step-{newest}", chance)
        self.result.story.append(f"step-{newest}: {done}")
        self.damaged.add(newest)

    def look_at_the_end(self, ended: Ended | None) -> None:
        result = self.result
        output = self.run.parent / "output"
        if not (ended and ended.finished):
            result.other.append(f"not finished after {result.starts} starts; see {output}")
            return
        asked = self.trial.kind.action in ("SIGTERM", "impatient")
        stops = {int(step) for (step,) in _noted(self.run, "landed")} if asked else ()
        limit = self.trial.settings.limit
        result.differing += verify.differences(self.reference.folder, self.run, stops, limit)
        result.other += [f"left over: {name}" for name in verify.leftovers(self.run)]
        last = max(verify.checkpoints(self.run).items())[1]
        result.other += filter(None, [verify.loadable(last)])
        log = output.read_text()
        for step in self.damaged:
            if self.trial.kind.damage != "undone rename" and f"step-{step}: " not in log:
                result.other.append(f"the damage of step-{step} was not logged")

    @staticmethod
    def _killed(kind: Kind | None, ended: Ended) -> bool:
        """Whether a timer came before the run's own end."""
        return kind is not None and kind.place == TIMER and -signal.SIGKILL in ended.codes


def _noted(run: Path, word: str) -> list[list[str]]:
    """What follows `word` in the lines of a run's journal that begin with it."""
    path = journal(run)
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.split()[1:] for line in lines if line.split()[0] == word]
