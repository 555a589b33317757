"""Runs rewards in worker processes, so that a reward that hangs or dies costs one score and not the run.

A worker has one job at a time, so killing it loses only that job. Workers are new interpreters (threads of torch and
CUDA do not survive a fork) that import only what the rewards need, and not the trainer's `__main__`. Each has its own
session: Ctrl-C does not reach it, and killing it kills its children too. When the trainer is gone, workers end by the
closed connection or by a timer.
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

from tqdm import tqdm

from vtfast.distributed import watchdog
from vtfast.rewards import get_reward
from vtfast.rewards.reward import Reward, RewardInput, RewardResult, call_reward, failed_result

Job = tuple[str, RewardInput]
"""Name of the reward, and its input."""
START_LIMIT = 300.0
"""Seconds for a worker to import the rewards."""
STARTS = 3
"""Workers in a row that may die before they have started."""
BAR_DELAY = 5.0
"""Seconds before a progress bar is shown."""
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

    def run(self, jobs: Sequence[Job], progress: bool = False) -> list[RewardResult]:
        """The jobs' scores, in their order."""
        scores: list[RewardResult | None] = [None] * len(jobs)
        waiting = deque(range(len(jobs)))
        bar = tqdm(total=len(jobs), desc="rewards", unit="score", delay=BAR_DELAY, leave=False, disable=not progress)
        try:
            while None in scores:
                self._assign_jobs(jobs, waiting, scores)
                self._collect(waiting, scores)
                watchdog.beat()
                bar.update(len(jobs) - scores.count(None) - bar.n)
        finally:
            bar.close()
            if None in scores:  # nobody will read the running jobs' scores
                self.close()
        return [score for score in scores if score is not None]

    def close(self) -> None:
        """End the workers; a later `run` starts new ones."""
        _end(self.workers)

    def _assign_jobs(self, jobs: Sequence[Job], waiting: deque[int], scores: list[RewardResult | None]) -> None:
        """Give a job to every idle worker; start workers up to the number of jobs."""
        while len(self.workers) < min(self.size, scores.count(None)):
            self.workers.append(_Worker(self.settings))
        for worker in [worker for worker in self.workers if worker.idle]:
            if not waiting:
                return
            try:
                worker.start_job(waiting[0], jobs[waiting[0]], self.timeout)
            except OSError:  # it died while it had nothing to do
                self._discard(worker)
                continue
            except Exception as error:  # the job cannot be pickled
                scores[waiting[0]] = failed_result(error)
            waiting.popleft()

    def _collect(self, waiting: deque[int], scores: list[RewardResult | None]) -> None:
        """Wait for the next message, exit or timeout, and store the scores."""
        busy = [worker for worker in self.workers if not worker.idle]
        first = min((worker.deadline for worker in busy), default=time.monotonic())
        ready = wait([worker.connection for worker in busy], max(0.0, first - time.monotonic()))
        for worker in busy:
            if worker.connection in ready:
                try:
                    message = worker.connection.recv()
                except (EOFError, OSError):
                    self._fail(worker, worker.exit_reason(), waiting, scores)
                    continue
                if worker.started:
                    assert worker.job is not None
                    scores[worker.job], worker.job = message, None
                worker.started, self.failed_starts = True, 0
            elif time.monotonic() >= worker.deadline:
                limit = f"{self.timeout:g} s (--reward_timeout)"
                late = f"no score within {limit}" if worker.started else f"not within {START_LIMIT:g} s"
                self._fail(worker, late, waiting, scores)

    def _fail(self, worker: "_Worker", reason: str, waiting: deque[int], scores: list[RewardResult | None]) -> None:
        """Fail the worker's job. If workers do not even start, fail all waiting jobs, so that `run` ends."""
        self._discard(worker)
        if worker.started:
            assert worker.job is not None
            scores[worker.job] = failed_result(reason)
            return
        self.failed_starts += 1
        if self.failed_starts >= STARTS:
            for number in waiting:
                scores[number] = failed_result(f"no worker started: {reason}")
            waiting.clear()

    def _discard(self, worker: "_Worker") -> None:
        self.workers.remove(worker)
        worker.stop()


class _Worker:
    """A process, our end of its connection, and its current job."""

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

    def start_job(self, number: int, job: Job, timeout: float) -> None:
        self.connection.send(job)
        self.job, self.deadline = number, time.monotonic() + timeout

    def exit_reason(self) -> str:
        """Why a process closed its connection."""
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
    """The worker's main loop: load the rewards, then score one input after the other until the trainer is gone."""
    connection = Connection(descriptor)
    names, mode, timeout = connection.recv()
    rewards = {name: _load(name, mode) for name in names}
    with open(os.devnull, "w") as nowhere, contextlib.suppress(EOFError, ConnectionError):
        connection.send("started")
        while True:
            name, response = connection.recv()
            # The trainer enforces the timeout. This timer ends a hanging worker when the trainer is gone.
            faulthandler.dump_traceback_later(2 * timeout + 1, exit=True, file=nowhere)
            reward = rewards[name]
            score = failed_result(reward) if isinstance(reward, Exception) else call_reward(reward, response)
            faulthandler.cancel_dump_traceback_later()
            connection.send(score)


def _load(name: str, mode: str) -> Reward | Exception:
    """A reward, or why it cannot be loaded, though the trainer could load it."""
    if name == "accuracy":
        importlib.import_module("math_verify")  # imports sympy, outside the first call's timeout
    try:
        return get_reward(name, mode)
    except Exception as error:
        return error
