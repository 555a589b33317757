"""Requests to stop: SIGTERM or SIGUSR1 of a scheduler, or Ctrl-C. The run saves and ends at the next resume point.

A signal may reach one rank long before the others (DeepSpeed's launcher signals one after the other and waits for
each), so a rank that gets one writes a file that the others look for.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

log = logging.getLogger("vtfast")
STOP_FILE = ".stop"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopNotice:
    """Whether this run was asked to stop."""

    def __init__(self, folder: Path) -> None:
        """`folder`: the run folder, on a file system that all ranks share."""
        self.file = folder / STOP_FILE
        self.signal: str | None = None

    @property
    def received(self) -> str | None:
        """The name of the signal, or None."""
        if self.signal is None and self.file.exists():
            self.signal = "a signal to another rank"
        return self.signal

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Record signals, which would otherwise end the process. A second Ctrl-C interrupts at once."""
        if threading.current_thread() is not threading.main_thread():
            log.info("signals are not handled: the run is not in the main thread")
            yield
            return
        before = {number: signal.signal(number, self._notice) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.file.unlink(missing_ok=True)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.signal is not None:
            return
        self.signal = signal.Signals(number).name
        try:
            self.file.touch()
        except OSError as error:
            log.warning("%s: cannot be written (%s), so other ranks continue to the end of the step", self.file, error)
