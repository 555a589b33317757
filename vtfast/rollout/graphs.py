"""CUDA graphs of the decode step, one for each number of rows that a step is padded to.

A decode step is hundreds of kernels of a few microseconds; launched one by one, the CPU is the bottleneck by far. A
graph replays them in one call. It reads and writes the addresses that it was captured with, so everything that a step
touches stays where it is: rows, output, cache, joined weights, and the trainer's weights (ZeRO-2 writes its updates
into the same memory).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from vtfast_kernels.checks import trusted

from vtfast.rollout.decode_state import Rows

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
WARM_UPS = 2

Step = Callable[[Rows], None]
Capture = Callable[[Step, Rows], Callable[[], None]]
"""(step, rows) -> what runs the step on those rows, again and again."""


def bucket(rows: int) -> int:
    """The smallest size in BUCKETS that holds `rows`; past the largest, multiples of it."""
    largest = BUCKETS[-1]
    return next((size for size in BUCKETS if size >= rows), -(-rows // largest) * largest)


class Graphs:
    """`run(step, rows, setting)` does what `step(rows)` does."""

    def __init__(self, capture: Capture | None = None) -> None:
        self.capture = capture or CudaCapture()
        self.replays: dict[Hashable, Callable[[], None]] = {}

    def run(self, step: Step, rows: Rows, setting: Hashable) -> None:
        """`rows`: views of the same buffer in every call. `setting`: whatever else on the host the step depends on;
        each gets graphs of its own."""
        key = len(rows.token), setting
        if key not in self.replays:
            saved = rows.copy()
            rows.clear()  # what a capture runs for real must not be anybody's tokens
            self.replays[key] = self.capture(step, rows)
            rows.write(saved)
        self.replays[key]()


class CudaCapture:
    """Captures into one memory pool: graphs never run at the same time, so they may share their scratch memory."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.side = torch.cuda.Stream()

    def __call__(self, step: Step, rows: Rows) -> Callable[[], None]:
        # Kernels compile, libraries choose and arguments are checked before, not during, the capture.
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            for _ in range(WARM_UPS):
                step(rows)
        torch.cuda.current_stream().wait_stream(self.side)
        graph = torch.cuda.CUDAGraph()
        with trusted(), torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            step(rows)
        return graph.replay
