"""`python -m bench profile [--out DIR]`: the time of one optimizer step, kernel by kernel.

A step of `bench step` under torch.profiler, after two warm-up steps. DIR/step-trace.json.gz opens in Perfetto or
chrome://tracing, with its phases marked; DIR/step-kernels.txt lists the most expensive kernels (on the CPU: operators).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bench._harness import device_name
from bench._ours import Ours
from bench._phases import Phases
from bench._task import make_task
from bench.step import parse_one_run

WARM_UP = 2
KERNELS = 15


def costliest(recorded: profile, device: str) -> list[tuple[str, int, float, float]]:
    """(name, calls, milliseconds, share of all) of the `KERNELS` that take the most time of `device`."""
    times = []
    for event in recorded.key_averages():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if event.is_user_annotation or on_device != (device == "cuda"):  # phases, optimizer steps
            continue
        time = event.self_device_time_total if on_device else event.self_cpu_time_total
        times.append((event.key, event.count, time / 1e3))
    total = sum(time for *_, time in times)
    times.sort(key=lambda entry: -entry[2])
    return [(*entry, entry[2] / total) for entry in times[:KERNELS]]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench profile", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="default gpu-results")
    options, shape, dtype = parse_one_run(parser, argv)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (options.device == "cuda")
    with make_task(shape, options.device, options.threads, dtype) as task:
        player = Ours(task, Phases(device=options.device))
        for _ in range(WARM_UP):
            player.step()
        with profile(activities=activities) as recorded:
            player.step()
        player.close()
    options.out.mkdir(parents=True, exist_ok=True)
    recorded.export_chrome_trace(str(options.out / "step-trace.json.gz"))
    lines = [f"one step, {shape}, {device_name(options.device)}", f"{'ms':>10}{'share':>8}{'calls':>8}  kernel"]
    for name, calls, ms, share in costliest(recorded, options.device):
        lines.append(f"{ms:>10.2f}{share:>8.1%}{calls:>8}  {name[:90]}")
    (options.out / "step-kernels.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0
