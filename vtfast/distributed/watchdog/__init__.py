"""Ranks that know of each other's life: one that dies, fails or hangs ends the others with a message that names it.

A collective alone says little about a lost rank: gloo an address, NCCL nothing until its timeout. So every rank has a
small thread with a connection to rank 0. What ends a run:

    died      the connection closed without a word, at once for a process, after `connection.GONE` seconds for a machine
    failed    an exception; the rank sends its reason before it ends
    hung      the main thread made no progress for `--rank_timeout` seconds, or the thread itself was not heard for so
              long (a stopped process). Start-up, saving and waiting for another rank need make no progress.

The main thread only sets fields of a small object; with one rank there is no thread and no connection. Ages are
measured where they are judged, by that machine's own clock. torch's own store has no place in this: it tells nobody
that a client is gone, and it goes away with the process that hosts it.
"""

from __future__ import annotations

import atexit
import contextlib
import sys
from collections.abc import Iterator

from vtfast.distributed.watchdog.connection import Door
from vtfast.distributed.watchdog.judge import RANK_LOST, Member, State
from vtfast.distributed.watchdog.watch import Hub, Spoke, Watch

__all__ = ["RANK_LOST", "Door", "Member", "beat", "fail", "no_progress_expected", "start_watchdog", "stop", "waiting"]

_state = State()
_watch: Watch | None = None


def start_watchdog(members: list[Member], rank: int, limit: float, door: Door | None, address: tuple) -> None:
    """Watch from now on. `members`: all ranks in order; `limit`: seconds without progress; `door`: rank 0's own;
    `address`: what rank 0's door said. Raises UserError where rank 0 cannot be reached."""
    global _watch
    kind, way = (Hub, door) if rank == 0 else (Spoke, address)
    _watch = kind(members, rank, _state, limit, way)
    _watch.start()
    atexit.register(_at_exit)


def beat(phase: str | None = None, step: int | None = None) -> None:
    """The main thread got on: a new phase or step, or one more piece of the phase. Costs next to nothing."""
    _state.beats += 1
    if step is not None:
        _state.step = step
    if phase is not None:
        _enter(phase, patient=False)


@contextlib.contextmanager
def no_progress_expected(phase: str) -> Iterator[None]:
    """In here nobody expects progress: one long call that cannot report any. Also a decorator."""
    before = _state.phase, _state.patient
    _enter(phase, patient=True)
    try:
        yield
    finally:
        _state.beats += 1
        _enter(*before)


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """In here this rank waits for others, and is not to blame for it."""
    _state.waiting = True
    try:
        yield
    finally:
        _state.waiting = False
        beat()


def _enter(phase: str, patient: bool) -> None:
    _state.phase, _state.patient = phase, patient
    if _watch is not None:
        _watch.wake()  # who dies now dies in this phase, not in the one last reported


def fail(reason: str, code: int) -> bool:
    """Tell the others why this rank ends; -> whether they have heard, and the first rank of each machine says so. Does
    not return where `reason` only follows from the loss of another rank: the process then ends with a message about
    that one. Bad input is always a reason of its own."""
    return _watch is not None and _watch.fail(reason, code)


def stop() -> None:
    """Nothing is left to do together; the end of this process is no death."""
    global _watch
    if _watch is not None:
        _watch.leave()
        _watch = None


def _at_exit() -> None:
    uncaught = getattr(sys, "last_value", None)
    if uncaught is None:
        stop()
