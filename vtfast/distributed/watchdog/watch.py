"""The threads: rank 0's hears all ranks and judges them; the others' report to it and judge rank 0 alone.

Only the thread touches the sockets. The main thread hands it a failure and waits for what becomes of it.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import sys
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path

from vtfast.distributed.watchdog.connection import Door, Line, connect
from vtfast.distributed.watchdog.judge import RANK_LOST, Judge, Member, State, Verdict
from vtfast.utils.text import first_line

INTERVAL = 1.0
"""Seconds between two reports of a rank."""
SETTLE = 0.5
"""Seconds between a failure and the verdict. A failure may be the mere echo of a death, or every rank's at once."""
ANSWER_LIMIT = 5.0
"""Seconds that a failing rank waits for the verdict before it ends with its own words."""
PACKAGE = Path(__file__).parents[2]


class Watch:
    """What both kinds of thread share. `state` belongs to the main thread; it is only read here."""

    judge: Judge

    def __init__(self, members: list[Member], rank: int, state: State, limit: float) -> None:
        self.members, self.rank, self.state = members, rank, state
        self.interval = min(INTERVAL, limit / 10)
        self.main = threading.main_thread().ident
        self.failure: Verdict | None = None
        """What the main thread failed with."""
        self.leaving = False
        self.over = threading.Event()
        """Set when the verdict is known, or this rank has left."""
        self.judged = False
        """Whether there was a verdict."""
        self.selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self.selector.register(self._woken, selectors.EVENT_READ)
        self.thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        self.thread.start()

    # For the main thread

    def wake(self) -> None:
        """Let the thread report at once."""
        with contextlib.suppress(BlockingIOError):  # it has many such calls to answer already
            self._wake.send(b"!")

    def fail(self, reason: str, code: int) -> bool:
        judge = Judge(self.members, float("inf"))
        judge.report(self.rank, self.report())
        self.failure = judge.failed(self.rank, first_line(reason or "no reason given", 500), code)
        self.wake()
        self.over.wait(ANSWER_LIMIT)  # the thread ends the process where another rank is to blame
        return self.judged

    def leave(self) -> None:
        self.leaving = True
        self.wake()
        self.thread.join(ANSWER_LIMIT)

    # For the thread

    def report(self) -> State:
        return replace(self.state, where=_where(self.main))

    def _run(self) -> None:
        last = time.monotonic()
        due = last
        while not self.over.is_set():
            ready = [key.fileobj for key, _ in self.selector.select(self.interval)]
            now = time.monotonic()
            # A process that was stopped, or a machine that slept, has not watched: that time counts for nobody.
            self.judge.now += min(now - last, 3 * self.interval)
            last = now
            if self._woken in ready:
                self._woken.recv(4096)
                due = now
            self.read([line for line in ready if line is not self._woken])
            if now >= due:
                due = now + self.interval
                self.tick()

    def read(self, ready: list) -> None:
        raise NotImplementedError

    def tick(self) -> None:
        raise NotImplementedError

    def end(self, verdict: Verdict) -> None:
        """The run is over. Returns in a rank that has words of its own for why."""
        mine, self.judged = self.failure, True
        if mine is None or (verdict.rank != self.rank and mine.code == RANK_LOST):
            if self.rank == self._speaker(verdict):
                # Not through sys.stderr: the main thread may hang while it holds its lock.
                os.write(2, f"\nerror: {verdict.message}\n".encode())
            self.close()
            os._exit(verdict.code)
        self.close()
        self.over.set()

    def _speaker(self, verdict: Verdict) -> int:
        """One voice a machine: its first rank that is able to."""
        host = self.members[self.rank].host
        here = [member.rank for member in self.members if member.host == host]
        able = [rank for rank in here if verdict.spoken or rank != verdict.rank]
        return (able or here)[0]

    def close(self) -> None:
        raise NotImplementedError


class Hub(Watch):
    """Rank 0's."""

    def __init__(self, members: list[Member], rank: int, state: State, limit: float, door: Door) -> None:
        super().__init__(members, rank, state, limit)
        self.judge = Judge(members, limit)
        self.door = door
        self.lines: dict[int, Line] = {}
        self.guests: list[Line] = []
        """Who has not shown the token yet."""
        self.failures: list[Verdict] = []
        self.settled = float("inf")
        """When the first failure becomes the verdict."""
        self.selector.register(door, selectors.EVENT_READ)

    def read(self, ready: list) -> None:
        for line in ready:
            if self.over.is_set():
                return
            if line is self.door:
                with contextlib.suppress(OSError):  # gone again already
                    guest = self.door.accept()
                    self.guests.append(guest)
                    self.selector.register(guest, selectors.EVENT_READ)
                continue
            try:
                messages = line.receive()
            except (EOFError, OSError) as error:
                self._closed(line, "" if isinstance(error, EOFError) else f"{error}")
                continue
            for message in messages:
                self._hear(line, message)

    def _hear(self, line: Line, message: dict) -> None:
        if line in self.guests:
            self.guests.remove(line)
            rank = message.get("rank")
            if message.get("token") == self.door.address[2] and rank in self.judge.rows:
                self.lines[rank] = line
            else:
                self._drop(line)
            return
        rank = next((r for r, known in self.lines.items() if known is line), None)
        if rank is None:  # the rest of what a stranger said
            return
        if "state" in message:
            self.judge.report(rank, State(**message["state"]))
        elif "failure" in message:
            self._failed(Verdict(**message["failure"]))
        elif "left" in message:
            self.judge.leave(rank)

    def _closed(self, line: Line, unreachable: str) -> None:
        self._drop(line)
        if line in self.guests:
            self.guests.remove(line)
            return
        rank = next(r for r, known in self.lines.items() if known is line)
        del self.lines[rank]
        if all(failure.rank != rank for failure in self.failures):
            verdict = self.judge.closed(rank, unreachable)
            if verdict:
                self.decide(verdict)

    def _failed(self, failure: Verdict) -> None:
        if not self.failures:
            self.settled = self.judge.now + SETTLE
        if failure not in self.failures:
            self.failures.append(failure)

    def _drop(self, line: Line) -> None:
        self.selector.unregister(line)
        line.close()

    def tick(self) -> None:
        if self.over.is_set():
            return
        state = self.report()
        self.judge.report(0, state)
        if self.failure:
            self._failed(self.failure)
        if self.judge.now >= self.settled:
            self.decide(self.failures[0])
        elif self.leaving:
            self._tell(left=True)
            self.close()
            self.over.set()
        elif verdict := self.judge.overdue():
            self.decide(verdict)
        else:
            self._tell(state=state.as_dict())

    def decide(self, verdict: Verdict) -> None:
        self._tell(verdict=verdict.as_dict())
        self.end(verdict)

    def _tell(self, **message: object) -> None:
        for line in self.lines.values():
            line.send(**message)

    def close(self) -> None:
        """Let the others read what was sent before the connections close."""
        until = time.monotonic() + SETTLE
        for line in self.lines.values():
            with contextlib.suppress(OSError, EOFError):
                line.socket.shutdown(socket.SHUT_WR)
                while (left := until - time.monotonic()) > 0:
                    line.socket.settimeout(left)
                    line.receive()
            line.close()
        self.door.close()


class Spoke(Watch):
    """Any other rank's."""

    def __init__(self, members: list[Member], rank: int, state: State, limit: float, address: tuple) -> None:
        super().__init__(members, rank, state, limit)
        self.judge = Judge(members[:1], limit, grace=3 * INTERVAL)  # rank 0 judges itself first
        self.line = connect(address, rank)
        self.told = False
        self.selector.register(self.line, selectors.EVENT_READ)

    def read(self, ready: list) -> None:
        if not ready:
            return
        try:
            messages = self.line.receive()
        except (EOFError, OSError) as error:
            unreachable = "" if isinstance(error, EOFError) else f"{error}"
            verdict = self.judge.closed(0, unreachable)
            if verdict:
                self.end(verdict)
            self.close()
            self.over.set()
            return
        for message in messages:
            if "verdict" in message:
                self.end(Verdict(**message["verdict"]))
                return
            if "left" in message:
                self.judge.leave(0)
            elif "state" in message:
                self.judge.report(0, State(**message["state"]))

    def tick(self) -> None:
        if self.over.is_set():
            return
        if self.leaving:
            self.line.send(left=True)
            self.close()
            self.over.set()
        elif self.failure and not self.told:
            self.told = True
            self.line.send(failure=self.failure.as_dict())
        elif verdict := self.judge.overdue():
            self.end(verdict)
        else:
            self.line.send(state=self.report().as_dict())

    def close(self) -> None:
        self.line.close()


def _where(thread: int) -> str:
    """The innermost place in vtfast that `thread` is in."""
    for frame, line in traceback.walk_stack(sys._current_frames()[thread]):
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE) and not path.is_relative_to(PACKAGE / "watchdog"):
            return f"{path.relative_to(PACKAGE.parent)}:{line} in {frame.f_code.co_name}"
    return ""
