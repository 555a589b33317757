"""Trials, one after the other: start, strike, look at what is left, start again with the same command, to the end."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from . import start, verify
from .damage import DAMAGES
from .places import Moment, Orders
from .plan import TIMER, Trial
from .runs import Settings

ROOT = Path(__file__).parents[2]
PATIENCE = 180.0
"""Seconds that one start may take."""
GRACE = 30.0
"""Seconds between SIGTERM and SIGKILL for the other ranks when one has died, as DeepSpeed's launcher has it."""
STARTS = 6
"""Starts after which a trial is given up."""
PREEMPTED = 75
"""Exit code of a run that saved because of a SIGTERM."""
MARK = "VTFAST_TRIAL"
"""Environment variable by which what a trial has started is known."""


@dataclass
class Ended:
    """How a start ended."""

    codes: list[int]
    """Of the ranks; negative: the signal. Under DeepSpeed's launcher, the launcher's alone."""
    seconds: float
    sessions: set[int]
    """By which what it leaves running is known."""
    hung: bool = False

    @property
    def finished(self) -> bool:
        return not any(self.codes)


@dataclass
class Result:
    trial: Trial
    starts: int = 0
    struck: int = 0
    """Faults that came to pass."""
    lost: list[str] = field(default_factory=list)
    """Checkpoints that were whole before a fault and are not after it."""
    differing: list[str] = field(default_factory=list)
    """What the finished run and the uninterrupted one do not share."""
    other: list[str] = field(default_factory=list)
    """Whatever else must not be: a start that failed by itself, a process or a file left over."""
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
        self.references: dict[str, tuple[Path, dict[str, dict[int, int]], float]] = {}
        path = os.pathsep.join(dict.fromkeys([str(ROOT), *(p for p in sys.path if p)]))
        binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = {
            "PYTHONPATH": path, "PATH": binaries, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
            "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload([f"{__package__}.preloaded"])

    # What trials are compared with

    def reference(self, settings: Settings) -> tuple[Path, dict[str, dict[int, int]], float]:
        """The folder of an ordinary, uninterrupted run; visits of each place by rank; seconds of a forked start.

        A forked run that nothing happens to counts the visits, and must equal the ordinary one."""
        if settings.name not in self.references:
            self._render()
            folder = self.folder / f"reference-{settings.name}"
            folder.mkdir(parents=True)
            ordinary, forked = folder / "ordinary", folder / "forked"
            self._check(self._ordinary(settings, ordinary), folder)
            self._check(ended := self._forked(settings, forked, None), folder)
            if different := list(verify.differences(ordinary, forked)):
                raise RuntimeError(f"{settings.name}: a forked run differs: {'; '.join(different)}")
            if not all(line["grad_norm"] for line in verify.metrics(ordinary)):
                raise RuntimeError(
                    f"{settings.name}: a step had no gradient, so nothing would show"
                )
            counts: dict[str, dict[int, int]] = defaultdict(dict)
            for rank, place, count in self._journal(forked, "counted"):
                counts[place][int(rank)] = int(count)
            self.references[settings.name] = ordinary, dict(counts), ended.seconds
        return self.references[settings.name]

    def _render(self) -> None:
        if not self.data.exists():
            from vtfast.synthetic import write_dataset

            write_dataset(self.data.parent, train=20, val=1, seed=0)

    @staticmethod
    def _check(ended: Ended, folder: Path) -> None:
        if not ended.finished:
            output = (folder / "output").read_text()[-3000:]
            raise RuntimeError(f"a run without any fault ended with {ended.codes}:\n{output}")

    # One trial

    def run(self, trial: Trial) -> Result:
        began = time.monotonic()
        result = Result(trial)
        reference, counts, seconds = self.reference(trial.settings)
        folder = self.folder / f"trial-{trial.number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        run = folder / "run"
        faults = [kind for kind in (trial.kind, trial.again) if kind]
        damaged: set[int] = set()
        finished = False
        while not finished and result.starts < STARTS:
            kind = faults[result.starts] if result.starts < len(faults) else None
            struck = len(self._journal(run, "struck"))
            if kind and kind.place == TIMER:
                after = trial.chance(f"timer {result.starts}").uniform(0, seconds)
                ended = self._forked(trial.settings, run, None, kill_after=after)
                result.story.append(f"killed after {after:.2f} s")
                result.struck += ended.codes == [-signal.SIGKILL] * trial.settings.ranks
            else:
                moment = trial.moment(kind, result.starts, counts) if kind else None
                ended = self._start(trial, run, moment)
            result.starts += 1
            now = [" ".join(words) for words in self._journal(run, "struck")[struck:]]
            result.struck += bool(now)
            result.story.append(f"start {result.starts}: {kind.name if kind else 'nothing planned'};"
                                f" struck (rank, place, visit): {', '.join(now) or 'no'};"
                                f" exit codes {ended.codes}")  # fmt: skip
            finished = ended.finished
            self._look(trial, run, ended, kind, bool(now), damaged, result)
            if kind and kind.damage and not finished:
                self._damage(kind.damage, run, trial.chance("damage"), damaged, result)
            if not finished and kind is None:
                break
        if finished:
            result.differing += verify.differences(reference, run)
            result.other += [f"left over: {name}" for name in verify.leftovers(run)]
            last = max(verify.checkpoints(run).items())[1]
            result.other += filter(None, [verify.loadable(last)])
        else:
            result.other.append(
                f"not finished after {result.starts} starts, see {folder / 'output'}"
            )
        result.seconds = time.monotonic() - began
        (folder / "story").write_text("\n".join([*result.story, *result.problems, ""]))
        return result

    def _look(
        self, trial: Trial, run: Path, ended: Ended, kind, struck: bool, damaged: set[int], result: Result
    ) -> None:  # fmt: skip
        """What must hold after every start, however it ended."""
        whole = verify.whole(run)
        landed = sorted({int(step) for (step,) in self._journal(run, "landed")} - damaged)
        for step in landed:
            newer = sum(other > step for other in whole)
            if step not in whole and newer < (trial.settings.limit or sys.maxsize):
                path = run / "checkpoints" / f"step-{step}"
                result.lost.append(
                    f"start {result.starts}: step-{step} was lost: {verify.problem(path)}"
                )
        if ended.hung:
            result.other.append(f"start {result.starts}: did not end, and was killed")
        notice = kind is not None and kind.action == "SIGTERM" and struck
        if notice and not trial.launcher and set(ended.codes) - {0, PREEMPTED}:
            result.other.append(f"start {result.starts}: exit codes {ended.codes} after a SIGTERM")
        if notice and PREEMPTED in ended.codes:
            steps = [line["step"] for line in verify.metrics(run)]
            iterations = trial.settings.own.get("num_iterations", 1)
            if steps and max(whole, default=0) + iterations <= steps[-1]:
                result.lost.append(
                    f"start {result.starts}: SIGTERM saved {whole}, of {steps[-1]} steps"
                )
        for process in verify.processes(f"{MARK}={run}", ended.sessions):
            result.other.append(f"start {result.starts}: process {process} was left running")
            os.kill(process, signal.SIGKILL)

    @staticmethod
    def _damage(
        name: str, run: Path, chance: random.Random, damaged: set[int], result: Result
    ) -> None:
        whole = verify.whole(run)
        if not whole:
            result.other.append("no checkpoint to damage")
            return
        done = DAMAGES[name](run / "checkpoints" / f"step-{whole[-1]}", chance)
        result.story.append(f"step-{whole[-1]}: {done}")
        damaged.add(whole[-1])

    # Starts

    def _start(self, trial: Trial, run: Path, moment: Moment | None) -> Ended:
        if trial.launcher:
            return self._ordinary(
                trial.settings, run, Orders(self._journal_of(run), str(run), moment)
            )
        return self._forked(trial.settings, run, moment)

    def _ordinary(self, settings: Settings, run: Path, orders: Orders | None = None) -> Ended:
        """A start as users make it: `python train.py`, or DeepSpeed's launcher. With `orders`, `start` stands before
        the trainer."""
        script = (
            ["--module", f"{__package__}.start", "train"] if orders else [str(ROOT / "train.py")]
        )
        command = [sys.executable, *script]
        if settings.ranks > 1:
            launcher = ["deepspeed", "--num_accelerators", str(settings.ranks)]
            command = [*launcher, "--master_port", str(_free_port()), *script]
        began, hung = time.monotonic(), False
        environment = os.environ | self.environment | {MARK: str(run)}
        environment |= orders.encode() if orders else {}
        with (run.parent / "output").open("a") as output:
            process = subprocess.Popen(
                [*command, *settings.flags(self.data, run)], cwd=ROOT, env=environment,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                hung = True
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        return Ended([process.returncode], time.monotonic() - began, {process.pid}, hung)

    def _forked(
        self, settings: Settings, run: Path, moment: Moment | None, kill_after: float | None = None
    ) -> Ended:
        """A start of all ranks from the process that has imported everything.

        `kill_after`: seconds, after which all ranks are killed."""
        orders = Orders(self._journal_of(run), str(run), moment)
        environment = self.environment | orders.encode() | {MARK: str(run)}
        if settings.ranks > 1:
            environment |= {
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(settings.ranks),
            }  # fmt: skip
        arguments = ["train", *settings.flags(self.data, run)]
        began = time.monotonic()
        ranks = []
        with _replaced(
            os.environ, self.environment
        ):  # the fork server is started by the first of them
            for rank in range(settings.ranks):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if settings.ranks > 1 else {}
                what = (arguments, environment | own, str(run.parent), str(run.parent / "output"))
                process = self.processes.Process(target=start.forked, args=what)
                process.start()
                ranks.append(process)
        try:
            hung = _see_out(ranks, kill_after)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        codes = [process.exitcode for process in ranks]
        return Ended(codes, time.monotonic() - began, {process.pid for process in ranks}, hung)

    # The journal that trainers write

    @staticmethod
    def _journal_of(run: Path) -> str:
        return str(run.with_name(f"{run.name}.journal"))

    def _journal(self, run: Path, word: str) -> list[list[str]]:
        """What follows `word` in the lines that begin with it."""
        path = Path(self._journal_of(run))
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.split()[1:] for line in lines if line.split()[0] == word]


def _see_out(ranks: Sequence[ForkServerProcess], kill_after: float | None) -> bool:
    """Wait for the ranks. One that dies takes the others along, as under DeepSpeed's launcher: it looks once a second,
    asks by SIGTERM and kills later. Returns whether any took longer than it may."""
    limit = time.monotonic() + (PATIENCE if kill_after is None else kill_after)
    alive = list(ranks)
    asked = False
    while alive:
        if not wait([process.sentinel for process in alive], max(0.0, limit - time.monotonic())):
            for process in alive:
                process.kill()
            return asked or kill_after is None
        alive = [process for process in alive if process.exitcode is None]
        if alive and not asked and any(process.exitcode for process in ranks):
            asked = True
            wait([process.sentinel for process in alive], 1.0)
            for process in alive:
                process.terminate()
            limit = time.monotonic() + GRACE
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def _replaced(mapping: MutableMapping[str, str], values: Mapping[str, str]) -> Iterator[None]:
    before = dict(mapping)
    mapping.update(values)
    try:
        yield
    finally:
        mapping.clear()
        mapping.update(before)
