"""Shared by the benches: clocks, alternating rounds, memory of a fresh process, rows of results/*.csv.

On CUDA every timed run starts with a cold L2 cache, and the SM clock is read while it runs.
"""

from __future__ import annotations

import csv
import ctypes
import functools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
RESULTS = Path(os.environ.get("VTFAST_RESULTS", Path(__file__).parent / "results"))
COLUMNS = (
    "op",
    "peer",
    "shape",
    "dtype",
    "metric",
    "p20",
    "p50",
    "p80",
    "ratio",
    "ratio_low",
    "ratio_high",
    "share",
    "device",
    "versions",
    "commit",
    "date",
    "clocks",
)
"""Columns of every file. `ratio`: ours / theirs, paired within rounds, with its 95% bootstrap interval. `share`: of the
floor or peak, if it is known. `clocks`: the SM clock in MHz, median over the runs of a row; empty on the CPU. A
`metric` of "not installed" or "failed" says why a peer has no numbers."""


NO_NUMBERS, GOALS_MISSED = 1, 3
"""Exit codes of a bench. Python's own after an exception is 1, too: nothing was reported. If goals are missed, all rows
are still written."""


def tests_pass(tests: Iterable[str]) -> bool:
    """Run these files of tests/ first; if one fails, the bench must report no numbers."""
    print("tests first ...", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow"]
    command += [str(ROOT / "tests" / file) for file in tests]
    if subprocess.run(command, cwd=ROOT).returncode == 0:
        return True
    print("a test fails: no numbers")
    return False


_clocks: list[int] = []
"""MHz of the timed runs since the last rows were written."""


def seconds(run: Callable[[], object], device: str) -> float:
    """Duration of one run; on CUDA measured by events."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        flush_l2()  # after the wait: while the device clears it, the host launches ahead
        start.record()
        run()
        end.record()
        clock = sm_clock()  # before the wait, while the device is busy or has just been
        torch.cuda.synchronize()
        if clock is not None:
            _clocks.append(clock)
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def flush_l2() -> None:
    """Overwrite the L2 cache twice, so that every run starts with a cold one."""
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    torch.empty(2 * size, dtype=torch.int8, device="cuda").zero_()


def sm_clock() -> int | None:
    """Current SM clock of the current device in MHz; None if the driver's library is missing or does not report it."""
    nvml = _nvml()
    if nvml is None:
        return None
    uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}".encode()
    handle, clock, of_sm = ctypes.c_void_p(), ctypes.c_uint(), 1
    if nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)):
        return None
    if nvml.nvmlDeviceGetClockInfo(handle, of_sm, ctypes.byref(clock)):
        return None
    return clock.value


@functools.cache
def _nvml() -> ctypes.CDLL | None:
    """The library of nvidia-smi. It comes with the driver; its Python package does not."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    return library if library.nvmlInit_v2() == 0 else None


def alternate(
    runs: Mapping[str, Callable[[], object]], rounds: int, device: str, limits: Mapping[str, int] = MappingProxyType({})
) -> dict[str, list[float]]:
    """Seconds of every run in each round. Every other round is in reverse order, so that no run is always first.

    `limits`: number of rounds, from the first one, of a slow run that does not take part in all."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds):
        for name in list(runs) if index % 2 == 0 else list(runs)[::-1]:
            if index < limits.get(name, rounds):
                times[name].append(seconds(runs[name], device))
    return times


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50, p80, with linear interpolation."""
    p20, p50, p80 = np.quantile(values, (0.2, 0.5, 0.8)).tolist()
    return p20, p50, p80


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Median of ours / theirs over rounds, and the ends of its 95% bootstrap interval."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
    return statistics.median(ratios), medians[50], medians[-51]


def growth_in_child(call: str) -> float:
    """Peak resident MB that a step adds in a fresh process. `call`: Python code that ends in `measure_growth(...)`."""
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def measure_growth(run: Callable[[], object]) -> None:
    """Print the growth of the resident memory in MB while `run` runs."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    run()
    print(json.dumps(resident("VmHWM") - before))


def resident(field: str) -> float:
    """MB of a memory field of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024


def absence(name: str, error: Exception) -> str:
    """The `metric` of a peer that raised `error` and has no numbers; also printed."""
    reason = "not installed" if isinstance(error, ImportError) else "failed"
    print(f"  {name}: {reason} ({type(error).__name__}: {str(error)[:200]})", flush=True)
    return reason


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu, {torch.get_num_threads()} threads"


def versions(*packages: str) -> str:
    installed = []
    for package in packages:
        try:
            installed.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return "; ".join(installed)


def commit() -> str:
    """The commit of the checkout; "unknown" without git and for an export, even inside another repository."""
    if not (ROOT / ".git").exists():
        return "unknown"
    try:
        head = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    except FileNotFoundError:
        return "unknown"
    return f"{head}-dirty" if head and changed else head or "unknown"


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], capture_output=True, text=True, cwd=ROOT).stdout.strip()


def append(file: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Append rows to results/`file`; missing columns stay empty, numbers get four digits.

    Raises ValueError for an unknown column, and for a file with other columns than COLUMNS."""
    path = RESULTS / file
    RESULTS.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    if not new:
        with path.open(newline="") as old:
            header = tuple(next(csv.reader(old), ()))
        if header != COLUMNS:
            raise ValueError(f"{path}: has the columns {', '.join(header)}, not bench._harness.COLUMNS")
    stamp = datetime.now(timezone.utc).isoformat(timespec="seconds")
    common = {"commit": commit(), "date": stamp}
    if _clocks:
        common["clocks"] = round(statistics.median(_clocks))
        _clocks.clear()
    with path.open("a", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS, restval="")
        if new:
            writer.writeheader()
        for row in rows:
            numbers = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow({**numbers, **common})
