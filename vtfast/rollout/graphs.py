"""CUDA graphs of the decode step, one for each number of rows that a step is padded to.

A decode step is hundreds of kernels of a few microseconds; launched one by one, the CPU is the bottleneck by far. A
graph replays them in one call. It reads and writes the addresses that it was captured with, so everything that a step
touches keeps its address: rows, output, cache, fused weights, and the trainer's weights (ZeRO-2 writes its updates
into the same memory).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from vtfast_kernels.checks import skip_checks

from vtfast.rollout.row_state import RowState

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
WARM_UPS = 2

Step = Callable[[RowState], None]
Capture = Callable[[Step, RowState], Callable[[], None]]
"""(step, rows) -> a function that replays the step on those rows."""


def bucket(rows: int) -> int:
    """Return the smallest size in BUCKETS that holds `rows`; past the largest, a multiple of it."""
    largest = BUCKETS[-1]
    return next((size for size in BUCKETS if size >= rows), -(-rows // largest) * largest)


class Graphs:
    """Runs a step from a graph, which is captured when the step first runs with so many rows."""

    def __init__(self, capture: Capture | None = None) -> None:
        self.capture = capture or CudaCapture()
        self.replays: dict[Hashable, Callable[[], None]] = {}

    def run(self, step: Step, rows: RowState, setting: Hashable) -> None:
        """Do what `step(rows)` does. `rows`: views of the same buffer in every call. `setting`: everything else on the
        host that the step depends on; each setting gets its own graphs."""
        key = len(rows.token), setting
        if key not in self.replays:
            saved = rows.clone()
            rows.clear()  # the warm-up steps of a capture run for real: not over running rows
            self.replays[key] = self.capture(step, rows)
            rows.copy_from(saved)
        self.replays[key]()


class CudaCapture:
    """Captures into one memory pool: graphs never run at the same time, so they can share their scratch memory."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()

    def __call__(self, step: Step, rows: RowState) -> Callable[[], None]:
        # Warm-up: kernels compile, libraries choose and arguments are checked before, not during, the capture.
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UPS):
                step(rows)
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with skip_checks(), torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            step(rows)
        return graph.replay
