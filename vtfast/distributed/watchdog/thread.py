"""The thread of each rank: it exchanges reports through the store, and all ranks end by the same failure.

Every rank applies the rules of `monitor.py`; the first to write a failure into the store decides for all.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import torch.distributed as dist

from vtfast.distributed.watchdog.monitor import RANK_LOST, Failure, Member, Monitor, Report

INTERVAL = 1.0
"""Seconds between two reports of a rank; fewer with a small limit."""
SETTLE = 2.5
"""Intervals from an exception to the end: a death that caused it may take as long to be reported by its machine, and
bad input that all ranks read is not found by all at once."""
ANSWER_LIMIT = 15.0
"""Seconds that the main thread waits for the thread before it ends the process by itself."""
FAILURE = "failure"
"""The store's key for the failure that ends the run."""
PACKAGE = Path(__file__).parents[2]


class WatchThread:
    """Started by `start`. `report` belongs to the main thread, which changes it; it is only read here."""

    def __init__(self, store: dist.Store, rank: int, size: int, report: Report, limit: float) -> None:
        self.store, self.rank, self.report, self.limit = store, rank, report, limit
        self.interval = min(INTERVAL, limit / 10)
        self.main_thread = threading.main_thread().ident
        self.num_reports = 0
        self.unanswered = 0.0
        """Seconds since the store last answered."""
        self.failures: dict[int, Failure] = {}
        """The exceptions that ranks have reported, the first one first."""
        self.first_failure_at = 0.0
        self.failed = False
        """Whether the watch ended by a failure."""
        self.done = threading.Event()
        """The watch is over."""
        self.wake = threading.Event()
        """Set by the main thread to exchange reports at once."""

        self.me = Member(rank, socket.gethostname(), os.getpid(), Path("/proc/self/ns/pid").stat().st_ino)
        store.set(f"member/{rank}", json.dumps(asdict(self.me)))
        members = [Member(**json.loads(store.get(f"member/{other}"))) for other in range(size)]
        self.monitor = Monitor(members, limit)
        self.processes = {
            other.rank: psutil.Process(other.pid)
            for other in members
            if other != self.me and (other.host, other.pid_namespace) == (self.me.host, self.me.pid_namespace)
        }
        self.report_keys = [f"report/{other}" for other in range(size)]
        self._publish()
        # The last report of each rank. This waits for all of them, so none ends while another looks up its process.
        self.texts = store.multi_get(self.report_keys)

    def start(self) -> None:
        self.thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self.thread.start()
        threading.Thread(target=self._watch_store, name="watchdog-store", daemon=True).start()

    # The main thread calls these

    def fail(self, reason: str, exit_code: int) -> bool:
        first_line = (reason.strip() or "no reason given").splitlines()[0][:500]
        message = f"{self.me} failed in {self.report}: {first_line}"
        self.report.failure = Failure(self.rank, message, exit_code, reported=True)
        self.wake.set()
        self.done.wait(ANSWER_LIMIT)  # if another rank is to blame, the thread ends the process
        return self.failed

    def stop(self) -> None:
        self.report.stopped = True
        self.wake.set()
        self.thread.join(ANSWER_LIMIT)
        self.done.set()

    def abandon(self) -> None:
        self.done.set()
        self.wake.set()
        self.thread.join(ANSWER_LIMIT)

    # The threads

    def _run(self) -> None:
        last = time.monotonic()
        while not self.done.is_set():
            self.wake.wait(0.1 if self.report.stopped else self.interval)
            self.wake.clear()
            now = time.monotonic()
            # A process that was stopped, or a machine that slept, has not watched: that time counts for no rank.
            self.monitor.now += min(now - last, 3 * self.interval)
            last = now
            try:
                self._exchange()
            except dist.DistError as error:  # the store's host is gone
                if not self.monitor.rows[0].report.stopped:
                    self._end(self._store_lost(error))
                self.done.set()

    def _watch_store(self) -> None:
        """Rank 0 may be stopped together with the store that it hosts: then the other thread waits without an end."""
        while not self.done.wait(self.interval):
            self.unanswered += self.interval
            if self.unanswered > self.limit + 3 * self.interval:
                self._end(self.monitor.silent({0: self.unanswered}))

    def _exchange(self) -> None:
        # In this order: a process that reports and then ends must not be seen as dead without its last report.
        gone = [rank for rank, process in self.processes.items() if _is_gone(process)]
        stopping = self._publish().stopped
        texts = self.store.multi_get(self.report_keys)
        self.unanswered = 0.0
        for rank, (text, before) in enumerate(zip(texts, self.texts, strict=True)):
            if text != before:
                self._record(rank, text)
        self.texts = texts
        rows = self.monitor.rows
        if self.store.check([FAILURE]):
            self._end(_failure(self.store.get(FAILURE)))
        elif failure := self._find_failure([rank for rank in gone if not rows[rank].report.stopped]):
            self._end(_failure(self.store.compare_set(FAILURE, "", json.dumps(asdict(failure)))))
        elif self.rank != 0 and rows[0].report.stopped:
            self.report.stopped = True
            self._publish()
            self.done.set()
        elif stopping and (self.rank != 0 or all(row.report.stopped for row in rows)):
            self.done.set()  # rank 0 is the last one, because it may host the store

    def _publish(self) -> Report:
        self.num_reports += 1
        report = replace(self.report, number=self.num_reports, where=_where(self.main_thread))
        self.store.set(f"report/{self.rank}", json.dumps(asdict(report)))
        return report

    def _record(self, rank: int, text: bytes) -> None:
        fields = json.loads(text)
        failure = fields["failure"] and Failure(**fields["failure"])
        self.monitor.record(rank, Report(**fields | {"failure": failure}))
        if failure and rank not in self.failures:
            self.first_failure_at = self.first_failure_at or self.monitor.now
            self.failures[rank] = failure

    def _find_failure(self, dead: list[int]) -> Failure | None:
        if dead:
            return self.monitor.died(dead[0])
        if self.failures:
            first = next(iter(self.failures.values()))
            return first if self.monitor.now - self.first_failure_at >= SETTLE * self.interval else None
        return self.monitor.overdue()

    def _store_lost(self, error: dist.DistError) -> Failure:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return self.monitor.died(0)
        return Failure(0, f"torchrun's store cannot be reached any more ({str(error).splitlines()[0]})", RANK_LOST)

    def _end(self, failure: Failure) -> None:
        """End the process, or return if its main thread has an error of its own to print."""
        self.failed = True
        mine = self.report.failure
        ends_here = mine is None or (failure.rank != self.rank and mine.exit_code == RANK_LOST)
        if ends_here and self.rank == self._speaker(failure):
            # Not through sys.stderr: the main thread may hang while it holds its lock.
            os.write(2, f"\nerror: {failure.message}\n".encode())
        if not ends_here:
            self.done.set()  # the main thread prints at once: a launcher kills it as soon as another rank has ended
        if self.rank == 0:
            time.sleep(2 * self.interval)  # it may host the store: let the others read the failure
        if ends_here:
            os._exit(failure.exit_code)

    def _speaker(self, failure: Failure) -> int:
        """The rank that prints the failure on this machine: the first one that can."""
        local = [member.rank for member in self.monitor.members if member.host == self.me.host]
        able = [rank for rank in local if failure.reported or rank != failure.rank]
        return (able or local)[0]


def _failure(text: bytes) -> Failure:
    return Failure(**json.loads(text))


def _is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _where(thread: int | None) -> str:
    """File, line and function of the innermost vtfast frame of `thread`."""
    assert thread is not None
    for frame, line in traceback.walk_stack(sys._current_frames()[thread]):
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE) and not path.is_relative_to(PACKAGE / "distributed" / "watchdog"):
            return f"{path.relative_to(PACKAGE.parent)}:{line} in {frame.f_code.co_name}"
    return ""
