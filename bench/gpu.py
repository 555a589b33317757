"""`python -m bench gpu [--minutes 9] [--out DIR]`: everything that needs a GPU, most important first, in limited time.

    tests         `pytest -m gpu`: the kernels, attention, captured decode steps and a short run, on the GPU
    first_steps   two steps of the trainer: memory beside the estimate, KL and drift before anything has changed
    rollout       whole rollouts beside generate, decode steps beside the memory's limit
    update        the packed update beside plain Hugging Face code and TRL
    step          a whole optimizer step beside TRL's trainer and the original recipe's structure
    kernels       the head's kernels beside TRL, Liger and plain PyTorch, and three bare matmuls
    profile       a trace of one step, and its costliest kernels

Each step is a process, which is stopped with all its children when the time is up; the tests get half of the time.
Logs and rows are written to DIR. A later call with the same DIR runs the steps that have not ended well, beginning with
those that were never tried. If a test fails nothing is measured; `--anyway` measures, but the numbers must not be
quoted. One GPU is used. DIR/summary.md is a one-page summary, and DIR.tar.gz holds all of DIR, after every step anew.
A bare checkout is enough: torch, triton and transformers are needed, other missing packages are named, and a step that
needs one of them is left out.
`--rehearse` runs the same on the CPU, at sizes that take minutes and only show that everything starts.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bench._harness import GOALS_MISSED, ROOT

PYTHON = sys.executable
OUT = "{out}"
"""Placeholder in a command: the folder of the results."""
WANTED = ("deepspeed", "liger_kernel", "trl", "datasets", "flash_attn", "peft", "pytest")


@dataclass(frozen=True)
class Step:
    name: str
    command: tuple[str, ...]
    rehearsal: tuple[str, ...]
    """The command on a CPU."""
    needs: tuple[str, ...] = ()
    """Packages without which it cannot run."""

    def lacks(self) -> list[str]:
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


PARALLEL = ("-n", "8") if importlib.util.find_spec("xdist") else ()
"""Most of the tests' time is Triton's compiler."""
GRAPHS = "tests/rollout/test_rollout_graphs.py"
STEPS = (
    Step(
        "tests",
        ("-m", "pytest", "-q", "--maxfail", "20", *PARALLEL, "-m", "gpu", "tests/kernels", "tests/gpu"),
        ("-m", "pytest", "-q", "-k", "rows", "tests/kernels/test_decode_layers.py", GRAPHS),
        needs=("pytest",),
    ),
    Step(
        "first_steps",
        ("-m", "bench", "first_steps"),
        ("-m", "bench", "first_steps", "--size", "rehearsal"),
        needs=("deepspeed",),
    ),
    Step(
        "rollout",
        ("-m", "bench", "rollout", "--no-tests", "--rounds", "5"),
        ("-m", "bench", "rollout", "--no-tests", "--rounds", "1", "--sizes", "rehearsal"),
    ),
    Step(
        "update",
        ("-m", "bench", "update", "--no-tests", "--rounds", "5"),
        ("-m", "bench", "update", "--no-tests", "--rounds", "1", "--sizes", "rehearsal"),
    ),
    Step(
        "step",
        ("-m", "bench", "step", "--no-tests", "--rounds", "3"),
        ("-m", "bench", "step", "--no-tests", "--rounds", "1", "--sizes", "rehearsal"),
        needs=("deepspeed",),
    ),
    Step(
        "kernels",
        ("-m", "bench", "kernels", "--no-tests", "--tokens", "5600", "45000"),
        ("-m", "bench", "kernels", "--no-tests", "--shape", "512", "2048", "64", "--rounds", "1"),
    ),
    Step(
        "profile",
        ("-m", "bench", "profile", "--out", OUT),
        ("-m", "bench", "profile", "--out", OUT, "--size", "rehearsal"),
        needs=("deepspeed",),
    ),
)


def environment(links: Path, out: Path, rehearse: bool) -> dict[str, str]:
    """Environment of the steps: the checkout's packages first, whether it is installed or not. Only the first GPU is
    visible, since a peer would distribute its batch over all it sees; for a rehearsal none."""
    (links / "vtfast_kernels").symlink_to(ROOT / "kernels")
    paths = [
        str(ROOT),
        str(links),
        str(ROOT / "tests"),
        str(ROOT / "tests" / "helpers"),
        os.environ.get("PYTHONPATH", ""),
    ]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "VTFAST_RESULTS": str(out.absolute()),
        "CUDA_VISIBLE_DEVICES": "" if rehearse else _first_gpu(),
    }


def _first_gpu() -> str:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def pending(done: dict[str, dict]) -> list[Step]:
    """Steps that can run and have not ended well: the tests, then steps never tried, then the others."""
    remaining = [s for s in STEPS if done.get(s.name, {}).get("ended") != "well" and not s.lacks()]
    return sorted(remaining, key=lambda step: step.name != "tests" and step.name in done)


def tests_failed(done: dict[str, dict]) -> bool:
    return done.get("tests", {}).get("ended") == "badly"


def run(step: Step, out: Path, seconds: float, env: dict[str, str], rehearse: bool) -> dict:
    """One step -> {"name", "seconds", "ended": "well" | "badly" | "stopped"}."""
    words = step.rehearsal if rehearse else step.command
    command = [PYTHON, *(str(out.absolute()) if word == OUT else word for word in words)]
    began, log = time.perf_counter(), out / f"{step.name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
            is_bench = step.name != "tests"  # a bench that misses a goal still has valid numbers
            ended = "well" if code == 0 or (is_bench and code == GOALS_MISSED) else "badly"
        except subprocess.TimeoutExpired:
            ended = "stopped"
        finally:  # workers that survive it would hold the GPU's memory
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return {"name": step.name, "seconds": round(time.perf_counter() - began, 1), "ended": ended}


def summary(done: dict[str, dict], out: Path, device: str) -> str:
    lines = [f"# {device}", ""]
    if done.get("tests", {}).get("ended") != "well":
        lines += ["**The tests have not passed on this machine: no number below may be quoted.**", ""]
    lines += ["| step | ended | seconds |", "|---|---|---|"]
    for step in STEPS:
        never = f"needs {', '.join(step.lacks())}" if step.lacks() else "not yet run"
        entry = done.get(step.name, {"ended": never, "seconds": ""})
        lines.append(f"| {step.name} | {entry['ended']} | {entry['seconds']} |")
    missing = [name for name in WANTED if importlib.util.find_spec(name) is None]
    lines += ["", f"not installed: {', '.join(missing) or 'nothing'}", ""]
    for step in STEPS:
        log = out / f"{step.name}.log"
        if log.exists():
            lines += [f"## {step.name}", "", "```", *_tail(log, 40), "```", ""]
    return "\n".join(lines)


def _tail(log: Path, lines: int) -> list[str]:
    return log.read_text(errors="replace").splitlines()[-lines:]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit in minutes (default 9)")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="default gpu-results")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU")
    parser.add_argument(
        "--anyway", action="store_true", help="measure although a test fails; the numbers must not be quoted"
    )
    options = parser.parse_args(argv)
    import torch

    if not options.rehearse and not torch.cuda.is_available():
        print("no CUDA device; --rehearse runs the steps on the CPU", file=sys.stderr)
        return 2
    device = "rehearsal on the CPU" if options.rehearse else torch.cuda.get_device_name()
    options.out.mkdir(parents=True, exist_ok=True)
    state = options.out / "steps.json"
    done = json.loads(state.read_text()) if state.exists() else {}
    ends = time.perf_counter() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as links:
        env = environment(Path(links), options.out, options.rehearse)
        steps = pending(done)
        for step in steps:
            left = ends - time.perf_counter()
            if left < 10:
                break
            if step.name != "tests" and tests_failed(done) and not options.anyway:
                print("a test fails: nothing is measured (--anyway measures)")
                break
            if step.name == "tests" and len(steps) > 1:
                left /= 2
            print(f"{step.name} ({left / 60:.1f} minutes left) ...", flush=True)
            done[step.name] = run(step, options.out, left, env, options.rehearse)
            print(f"  ended {done[step.name]['ended']}, {done[step.name]['seconds']} s", flush=True)
            if done[step.name]["ended"] != "well":
                print(*_tail(options.out / f"{step.name}.log", 15), sep="\n")
            state.write_text(json.dumps(done, indent=1) + "\n")
            (options.out / "summary.md").write_text(summary(done, options.out, device) + "\n")
            shutil.make_archive(str(options.out), "gztar", options.out.parent, options.out.name)
    remaining = [step.name for step in STEPS if step in pending(done)]
    print(f"remaining: {', '.join(remaining) or 'nothing'}; {options.out / 'summary.md'}")
    return 1 if remaining else 0
