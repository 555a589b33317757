"""Rewards in processes of their own, so that one that hangs or dies costs one score and not the run.

A worker has one job at a time and the others wait here, so killing it loses nothing but that job. Workers are fresh
interpreters (threads of torch and CUDA do not survive a fork) that import no more than the rewards need; the
`__main__` of the trainer is not imported again. They live in sessions of their own: Ctrl-C does not reach them, and a
kill takes what they started with them. Without a trainer they end, by the closed connection or by a timer.
"""

import contextlib
import faulthandler
import importlib
import os
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from tqdm import tqdm

from vtfast.distributed import watchdog
from vtfast.rewards import get_reward
from vtfast.rewards.reward import Reward, RewardInput, Score, call, failed

Job = tuple[str, RewardInput]
"""Name of the reward, and what it judges."""
START_LIMIT = 300.0
"""Seconds for a worker to import the rewards."""
STARTS = 3
"""Workers that may die one after the other before any has started."""
BAR_DELAY = 5.0
"""Seconds before the scoring shows its progress bar."""
_MAIN = "import sys; sys.path[:] = sys.argv[2:]; from vtfast.rewards.worker_pool import serve; serve(int(sys.argv[1]))"


class WorkerPool:
    """Up to `size` workers that score with the rewards called `names`; started when there is work for them."""

    def __init__(self, names: Sequence[str], mode: str, size: int, timeout: float) -> None:
        """`timeout`: seconds for one call of a reward, counted from when a worker has it."""
        self.settings = (tuple(names), mode, timeout)
        self.size, self.timeout = size, timeout
        self.failed_starts = 0  # in a row
        self.workers: list[_Worker] = []
        weakref.finalize(self, _end, self.workers)  # at the interpreter's exit too

    def run(self, jobs: Sequence[Job], progress: bool = False) -> list[Score]:
        """The jobs' scores, in their order."""
        scores: list[Score | None] = [None] * len(jobs)
        waiting = deque(range(len(jobs)))
        bar = tqdm(total=len(jobs), desc="rewards", unit="score", delay=BAR_DELAY, leave=False, disable=not progress)
        try:
            while None in scores:
                self._hand_out(jobs, waiting, scores)
                self._collect(waiting, scores)
                watchdog.beat()
                bar.update(len(jobs) - scores.count(None) - bar.n)
        except BaseException:
            self.close()  # what is still running belongs to nobody
            raise
        finally:
            bar.close()
        return scores

    def close(self) -> None:
        """End the workers; a later `run` starts new ones."""
        _end(self.workers)

    def _hand_out(self, jobs: Sequence[Job], waiting: deque[int], scores: list[Score | None]) -> None:
        """A job to every worker that has none, with as many workers as there are jobs to do."""
        while len(self.workers) < min(self.size, scores.count(None)):
            self.workers.append(_Worker(self.settings))
        for worker in [worker for worker in self.workers if worker.idle]:
            if not waiting:
                return
            try:
                worker.take(waiting[0], jobs[waiting[0]], self.timeout)
            except OSError:  # it died while it had nothing to do
                self._discard(worker)
                continue
            except Exception as error:  # the job cannot be pickled
                scores[waiting[0]] = failed(error)
            waiting.popleft()

    def _collect(self, waiting: deque[int], scores: list[Score | None]) -> None:
        """Wait for the next message, end or overrun time, and settle the jobs concerned."""
        busy = [worker for worker in self.workers if not worker.idle]
        first = min((worker.deadline for worker in busy), default=time.monotonic())
        ready = wait([worker.connection for worker in busy], max(0.0, first - time.monotonic()))
        for worker in busy:
            if worker.connection in ready:
                try:
                    message = worker.connection.recv()
                except (EOFError, OSError):
                    self._bury(worker, worker.last_words(), waiting, scores)
                    continue
                if worker.started:
                    scores[worker.job], worker.job = message, None
                worker.started, self.failed_starts = True, 0
            elif time.monotonic() >= worker.deadline:
                limit = f"{self.timeout:g} s (--reward_timeout)"
                late = f"no score within {limit}" if worker.started else f"not within {START_LIMIT:g} s"
                self._bury(worker, late, waiting, scores)

    def _bury(self, worker: "_Worker", reason: str, waiting: deque[int], scores: list[Score | None]) -> None:
        """Its job fails. If workers do not even start, all that wait fail, so that the work comes to an end."""
        self._discard(worker)
        if worker.started:
            scores[worker.job] = failed(reason)
            return
        self.failed_starts += 1
        if self.failed_starts >= STARTS:
            for number in waiting:
                scores[number] = failed(f"no worker started: {reason}")
            waiting.clear()

    def _discard(self, worker: "_Worker") -> None:
        self.workers.remove(worker)
        worker.stop()


class _Worker:
    """A process, our end of its connection, and what it is doing."""

    def __init__(self, settings: tuple[tuple[str, ...], str, float]) -> None:
        self.connection, theirs = Pipe()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _MAIN, str(theirs.fileno()), *sys.path],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        with contextlib.suppress(OSError):  # dead already: `wait` will tell
            self.connection.send(settings)
        self.started = False
        self.job: int | None = None
        self.deadline = time.monotonic() + START_LIMIT

    @property
    def idle(self) -> bool:
        return self.started and self.job is None

    def take(self, number: int, job: Job, timeout: float) -> None:
        self.connection.send(job)
        self.job, self.deadline = number, time.monotonic() + timeout

    def last_words(self) -> str:
        """How a process ended whose connection is closed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)
        code = self.process.poll()
        if code is None:
            return "its process closed the connection"
        return f"its process ended ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.connection.close()


def _end(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().stop()


def serve(descriptor: int) -> None:
    """What a worker does: load the rewards, then score one response after the other until the trainer is gone."""
    connection = Connection(descriptor)
    names, mode, timeout = connection.recv()
    rewards = {name: _load(name, mode) for name in names}
    with open(os.devnull, "w") as nowhere, contextlib.suppress(EOFError, ConnectionError):
        connection.send("started")
        while True:
            name, response = connection.recv()
            # The trainer's clock decides. This one ends a worker that hangs when there is no trainer any more.
            faulthandler.dump_traceback_later(2 * timeout + 1, exit=True, file=nowhere)
            score = call(rewards[name], response)
            faulthandler.cancel_dump_traceback_later()
            connection.send(score)


def _load(name: str, mode: str) -> Reward:
    """The reward; one that cannot be loaded here, though it could in the trainer, fails at every call."""
    if name == "accuracy":
        importlib.import_module("math_verify")  # brings sympy; not on the time of the first call
    try:
        return get_reward(name, mode)
    except Exception as error:
        reason = error

    def missing(completion: str, sample: Any) -> float:
        raise reason

    return missing
