"""The time that collectives of n GPUs on m machines take.

all-reduce    each GPU sends 2 (n - 1) / n of the bytes; a ring's 2 (n - 1) hops, or a tree's (a chain inside a
              machine, 2 log2(m) hops between them), whichever is faster
all-gather    each GPU sends (n - 1) / n of the bytes over a ring's n - 1 hops; a reduce-scatter likewise
bandwidth     inside a machine that of a GPU's link; between machines that of all ports of a machine, if lower
"""

from __future__ import annotations

import math
from dataclasses import dataclass

HOP, NETWORK_HOP = 3.4e-6, 14e-6
"""Seconds of a hop by NVLink, and between machines: the constants of NCCL's own cost model (src/graph/tuning.cc, rings,
Simple protocol)."""


@dataclass(frozen=True)
class Cluster:
    """The links between GPUs. Rates are bytes/s in one direction, while as many are received."""

    link: float
    """Inside a machine."""
    network: float
    """Of a GPU's own port to other machines."""
    node: int = 8
    """GPUs of a machine."""

    def machines(self, n: int) -> int:
        return -(-n // self.node)

    def bandwidth(self, n: int) -> float:
        """Bytes/s at which a GPU sends its share of a collective."""
        return self.link if n <= self.node else min(self.link, self.node * self.network)

    def hop(self, n: int) -> float:
        """Seconds of a ring's average hop: the ring leaves every machine once."""
        m = self.machines(n)
        return HOP if m == 1 else ((n - m) * HOP + m * NETWORK_HOP) / n

    def all_reduce(self, n: int, size: float) -> float:
        """Seconds."""
        if n == 1 or size == 0:
            return 0.0
        ring = 2 * (n - 1) * self.hop(n)
        chain, levels = min(n, self.node) - 1, math.ceil(math.log2(self.machines(n)))
        tree = 2 * chain * HOP + 2 * levels * NETWORK_HOP
        return all_reduce_bytes(n, size) / self.bandwidth(n) + min(ring, tree)

    def all_gather(self, n: int, size: float) -> float:
        """Seconds, also of a reduce-scatter."""
        if n == 1 or size == 0:
            return 0.0
        return all_gather_bytes(n, size) / self.bandwidth(n) + (n - 1) * self.hop(n)


def all_reduce_bytes(n: int, size: float) -> float:
    """Sent by each rank."""
    return 2 * (n - 1) / n * size


def all_gather_bytes(n: int, size: float) -> float:
    """Sent by each rank; `size`: bytes of the gathered tensor."""
    return (n - 1) / n * size
