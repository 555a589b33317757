"""What a device can do at most: data sheets of known GPUs, or a measurement of the device at hand.

Data sheets: NVIDIA A100, H100 and H200 (dense rates, without sparsity). Vendors give a link's rate for both directions
together; here it is one direction's, since a ring sends and receives at the same time.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from vtfast.distributed.ranks import Ranks

LINKS = {
    "nvlink4": 450e9,
    "nvlink3": 300e9,
    "pcie5": 64e9,
    "pcie4": 32e9,
    "ndr": 50e9,
    "hdr": 25e9,
    "ethernet100": 12.5e9,
}
"""Bytes/s of a GPU in one direction. NVLink of H100 and H200, of A100; PCIe with 16 lanes; one InfiniBand or Ethernet
port of 400, 200 and 100 Gbit/s."""


@dataclass(frozen=True)
class Sheet:
    """A device's data sheet."""

    bf16: float
    """Dense FLOP/s of the tensor cores."""
    fp32: float
    """FLOP/s without TF32, which PyTorch leaves off for matmuls."""
    bandwidth: float
    """Bytes/s of the memory."""
    link: str
    """What joins the GPUs of one machine: a name in LINKS."""


DEVICES = {
    "H200 NVL": Sheet(835e12, 60e12, 4.8e12, "pcie5"),
    "H200": Sheet(989e12, 67e12, 4.8e12, "nvlink4"),
    "H100 NVL": Sheet(835e12, 60e12, 3.9e12, "pcie5"),
    "H100 PCIe": Sheet(756e12, 51e12, 2.0e12, "pcie5"),
    "H100": Sheet(989e12, 67e12, 3.35e12, "nvlink4"),
    "A100-PCIE-40GB": Sheet(312e12, 19.5e12, 1.555e12, "pcie4"),
    "A100 80GB PCIe": Sheet(312e12, 19.5e12, 1.935e12, "pcie4"),
    "A100-SXM4-40GB": Sheet(312e12, 19.5e12, 1.555e12, "nvlink3"),
    "A100": Sheet(312e12, 19.5e12, 2.039e12, "nvlink3"),
}
"""By words of the device's name, the more particular first. A plain number is the SXM module."""


def find_sheet(name: str) -> Sheet | None:
    """The data sheet whose words stand in a device's name as whole words (a GH200 is no H200)."""
    return next((sheet for words, sheet in DEVICES.items() if re.search(rf"\b{re.escape(words)}\b", name)), None)


@dataclass(frozen=True)
class Rates:
    """What time is counted against."""

    flops: float
    """FLOP/s of matmuls in the precision of the weights."""
    bandwidth: float
    """Bytes/s of the memory."""
    link: float | None = None
    """Bytes/s that a rank sends while it receives as many; None: not known, or one rank."""
    source: str = "data sheet"
    """data sheet or measured."""


def data_sheet(name: str, dtype: torch.dtype, link: bool = False) -> Rates | None:
    """Of the device of this name; None if it is not listed. `link`: ranks talk to each other, on one machine."""
    sheet = find_sheet(name)
    if sheet is None:
        return None
    flops = sheet.fp32 if dtype == torch.float32 else sheet.bf16
    return Rates(flops, sheet.bandwidth, LINKS[sheet.link] if link else None)


def measured(dtype: torch.dtype, ranks: Ranks) -> Rates:
    """Of the device at hand, in a fraction of a second: the best of a few matmuls, copies and, over several ranks,
    all-reduces. Collective. What fits into a cache can run faster than the memory's rate."""
    device, cuda = ranks.device, ranks.device.type == "cuda"
    n, size = (8192, 2**30) if cuda else (1024, 2**27)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    flops = 2.0 * n**3 / _best(lambda: a @ b, device)
    bandwidth = 2.0 * size / _best(lambda: target.copy_(source), device)  # read and written
    link = None
    if ranks.size > 1:
        part = source[: size // 8].view(torch.float32)
        volume = 2 * (ranks.size - 1) / ranks.size * part.nbytes  # of a ring
        link = volume / _best(lambda: dist.all_reduce(part), device)
    return Rates(flops, bandwidth, link, "measured")


def _best(run: Callable[[], object], device: torch.device, rounds: int = 4) -> float:
    """Seconds of the fastest of several runs."""
    seconds = []
    for _ in range(rounds):
        _wait(device)
        began = time.perf_counter()
        run()
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_rates(dtype: torch.dtype, ranks: Ranks, measure: bool) -> Rates | None:
    """Measured, or the data sheet's; None where the device has none. Collective if `measure`.

    The network between machines is no property of the device: over several of them only a measured link is known."""
    if measure:
        return measured(dtype, ranks)
    if ranks.device.type != "cuda":
        return None
    one_machine = 1 < ranks.size <= torch.cuda.device_count()
    return data_sheet(torch.cuda.get_device_name(ranks.device), dtype, link=one_machine)


def mfu(flops: float, seconds: float, device: torch.device) -> float | None:
    """Share of the device's dense bf16 peak that `flops` useful operations reach; None where the peak is not known."""
    sheet = find_sheet(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if sheet is None else flops / seconds / sheet.bf16
