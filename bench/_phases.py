"""Time of a step by named phases, each without the phases inside it."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch

REST = "rest"


class Phases:
    """Seconds by phase of every step.

    The time between two changes of phase is added to the innermost open phase, so that the phases of a step add up to
    it exactly. Time outside all phases is `REST`.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, device: str = "cpu") -> None:
        self.clock, self.device = clock, device
        self.steps: list[dict[str, float]] = []
        self._open: list[str] = []
        self._mark = 0.0

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Add a row to `steps`. Time outside of a step is not counted."""
        self.steps.append({})
        with self.phase(REST, opens_a_step=True):
            yield

    @contextlib.contextmanager
    def phase(self, name: str, opens_a_step: bool = False) -> Iterator[None]:
        if not self._open and not opens_a_step:
            yield
            return
        self._turn()
        self._open.append(name)
        try:
            with torch.profiler.record_function(name):  # for `bench profile`
                yield
        finally:
            self._turn()
            self._open.pop()

    def watch(self, owner: Any, method: str, phase: str | Callable[..., str]) -> None:
        """Count every call of `owner.method` as `phase`: a name, or a function from the call's arguments to one."""
        inner = getattr(owner, method)

        @functools.wraps(inner)
        def watched(*args, **kwargs):
            with self.phase(phase(*args, **kwargs) if callable(phase) else phase):
                return inner(*args, **kwargs)

        setattr(owner, method, watched)

    def totals(self) -> list[float]:
        """Seconds of each step."""
        return [sum(step.values()) for step in self.steps]

    def medians(self, names: tuple[str, ...]) -> dict[str, float]:
        """Median seconds of each phase over the steps."""
        return {name: median(step.get(name, 0.0) for step in self.steps) for name in names}

    def _turn(self) -> None:
        if self.device == "cuda":  # the device's work belongs to the phase that launched it
            torch.cuda.synchronize()
        now = self.clock()
        if self._open:
            step = self.steps[-1]
            step[self._open[-1]] = step.get(self._open[-1], 0.0) + now - self._mark
        self._mark = now
