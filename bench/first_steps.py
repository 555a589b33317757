"""`python -m bench first_steps`: the first steps of a run: memory beside the estimate, KL and sampler drift.

The trainer of `train.py`, with a reference model, on Qwen2-VL-2B's sizes with random weights (on the CPU: mid). Before
the first update policy, reference and sampler are one model: KL and drift in step 1 are rounding, and nothing else.
Memory is what PyTorch's allocator held at most, beside `--dry-run`'s estimate without its allowance for CUDA itself.
Rows are appended to results/first_steps.csv.
"""

from __future__ import annotations

import argparse

from bench._harness import GOALS_MISSED, append, device_name, versions
from bench._ours import Ours
from bench._phases import Phases
from bench._task import make_task
from bench.step import parse_one_run
from vtfast.config import load_config
from vtfast.cost.memory import estimate_memory
from vtfast.cost.verdict import find_device

STEPS = 2
METRICS = ("loss", "kl", "sampler_drift", "sampler_drift_max", "grad_norm", "memory_gb", "time/step")
MOST_DRIFT = 0.02
"""Nats a token, on average, in step 1. With equal rounding it is 0 in bf16, too; the order of sums differs."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench first_steps", description=__doc__.split("\n")[0])
    options, shape, dtype = parse_one_run(parser, argv)
    device = find_device(
        load_config(overrides={"device": options.device})
    )  # before the model is loaded, as the trainer
    with make_task(shape, options.device, options.threads, dtype) as task:
        player = Ours(task, Phases(device=options.device))
        trainer = player.trainer
        memory = estimate_memory(trainer.session.policy, trainer.config, 1, device.kind, device.bytes)
        estimate = (memory.peak - memory.overhead) / 1e9
        seen = [dict(trainer.step(step, next(player.questions)).metrics) for step in range(1, STEPS + 1)]
        player.close()
    print(f"{shape}, {str(dtype)[6:]}, {device_name(options.device)}")
    print(f"  {'':<20}" + "".join(f"{f'step {step}':>12}" for step in range(1, STEPS + 1)))
    for name in METRICS:
        print(f"  {name:<20}" + "".join(f"{metrics[name]:>12.4g}" for metrics in seen))
    print(f"  estimate of the memory: {estimate:.2f} GB, {estimate / seen[-1]['memory_gb']:.2f} of what was held")
    rows = [(name, [metrics[name] for metrics in seen]) for name in METRICS]
    rows.append(("estimate_gb", [estimate] * STEPS))
    append(
        "first_steps.csv",
        [
            {
                "op": "first_steps",
                "peer": "ours",
                "shape": f"{shape}, step {step}",
                "dtype": str(dtype)[6:],
                "metric": name,
                "p50": values[step - 1],
                "device": device_name(options.device),
                "versions": versions("torch", "transformers", "deepspeed", "liger-kernel"),
            }
            for name, values in rows
            for step in range(1, STEPS + 1)
        ],
    )
    good = seen[0]["sampler_drift"] < MOST_DRIFT and abs(seen[0]["kl"]) < MOST_DRIFT
    print(f"  goal: KL and drift of step 1 below {MOST_DRIFT}, {'met' if good else 'NOT met'}")
    return 0 if good else GOALS_MISSED
