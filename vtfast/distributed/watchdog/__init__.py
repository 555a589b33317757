"""The watchdog: a rank that dies, fails or hangs ends the whole run, with one line that names it. `monitor.py` decides.

A collective alone says little about a lost rank: gloo an address, NCCL nothing until its timeout. So every rank has a
small thread that writes a report to the launcher's TCPStore once a second and reads the reports of the others:

    died      its process is gone (seen by the ranks of its machine), or, for rank 0, the store that it hosts
    failed    an exception; the report carries its message
    hung      the main thread made no progress for `--rank_timeout` seconds, or no report came for so long (a stopped
              process, a lost machine). Start-up, saving and waiting for other ranks need no progress.

The main thread only sets the fields of its report. One rank alone has no thread.
"""

from __future__ import annotations

import atexit
import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vtfast.distributed.watchdog.monitor import RANK_LOST, Report

if TYPE_CHECKING:
    import torch.distributed as dist

    from vtfast.distributed.watchdog.thread import WatchThread

__all__ = [
    "RANK_LOST",
    "beat",
    "fail",
    "has_failed",
    "no_progress_expected",
    "progress",
    "start_watchdog",
    "stop",
    "waiting",
]

_report = Report()
_thread: WatchThread | None = None


def start_watchdog(store: dist.Store, rank: int, size: int, limit: float) -> None:
    """Watch all ranks from now on; collective. `store`: a client that nothing else uses; `limit`: seconds without
    progress after which a rank counts as hung."""
    global _thread
    from vtfast.distributed.watchdog.thread import WatchThread  # needs torch, which the command line does not load

    _thread = WatchThread(store, rank, size, _report, limit)
    _thread.start()
    atexit.register(_at_exit)


def beat(phase: str | None = None, step: int | None = None) -> None:
    """Report progress: a new phase, a new step, or one more piece of work in the same phase. Costs next to nothing."""
    _report.beats += 1
    if step is not None:
        _report.step = step
    if phase is not None:
        _enter(phase, idle=False)


def progress() -> str:
    """Step and phase of this rank."""
    return str(_report)


@contextlib.contextmanager
def no_progress_expected(phase: str) -> Iterator[None]:
    """A phase that is one long call and cannot report progress. Also a decorator."""
    before = _report.phase, _report.idle
    _enter(phase, idle=True)
    try:
        yield
    finally:
        _report.beats += 1
        _enter(*before)


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """This rank waits for other ranks in a collective, so it does not count as hung."""
    _report.waiting = True
    try:
        yield
    finally:
        _report.waiting = False
        beat()


def _enter(phase: str, idle: bool) -> None:
    _report.phase, _report.idle = phase, idle
    if _thread is not None:
        _thread.wake.set()  # if the rank dies now, the others know this phase and not the one last reported


def fail(reason: str, exit_code: int) -> bool:
    """Tell the other ranks why this one ends. Returns whether they know; the first rank of each machine then prints it.

    Does not return if `reason` is only a consequence of another rank's loss (exit code RANK_LOST): the process then
    ends with a message about that rank."""
    return _thread is not None and _thread.fail(reason, exit_code)


def has_failed() -> bool:
    """Whether this process ends by an exception that nobody caught, or its run by a failure of any rank."""
    return getattr(sys, "last_value", None) is not None or (_thread is not None and _thread.failed)


def stop() -> None:
    """End the watch: the ranks have no more work in common, and the end of this process is not a failure."""
    global _thread
    if _thread is not None:
        _thread.stop()
        _thread = None


def _at_exit() -> None:
    if getattr(sys, "last_value", None) is None:
        stop()
    elif _thread is not None:  # an uncaught exception: without a last report, so that the others see a death
        _thread.abandon()
