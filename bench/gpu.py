"""`python -m bench gpu [--minutes 9] [--out DIR]`: all that wants a GPU, in the order of its worth, in a time box.

    tests     `pytest -m gpu`: the kernels, attention, captured decode steps and a short run, on the GPU
    kernels   the head's kernels beside TRL, Liger and plain PyTorch, and three bare matmuls
    rollout   whole rollouts beside generate, decode steps beside the memory's limit
    update    the packed update beside plain Hugging Face code and TRL
    step      a whole optimizer step beside TRL's trainer and the original recipe's structure
    profile   a trace of one step, and its costliest kernels

Each step is a process of its own, stopped with all that it started when the box is full; the tests have half of it.
Its log and its rows go to DIR. A later call with the same DIR runs what has not ended well, steps that were never tried
first. After a red test nothing is measured, unless `--anyway` asks for numbers not fit for quoting. One GPU is used.
DIR/summary.md is one page.
A bare checkout will do: torch, triton and transformers are needed, what else is missing is named, and a step that
cannot do without it is left out.
`--rehearse` runs the same on the CPU, at sizes that take minutes and show nothing but that everything starts.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
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
"""In a command: the folder of the results."""
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


GRAPHS = "tests/rollout/test_rollout_graphs.py"
STEPS = (
    Step(
        "tests",
        ("-m", "pytest", "-q", "--maxfail", "20", "-m", "gpu", "tests/kernels", "tests/gpu"),
        ("-m", "pytest", "-q", "-k", "rows", "tests/kernels/test_decode_layers.py", GRAPHS),
        needs=("pytest",),
    ),
    Step(
        "kernels",
        ("-m", "bench", "kernels", "--no-tests", "--tokens", "5600", "45000"),
        ("-m", "bench", "kernels", "--no-tests", "--shape", "512", "2048", "64", "--rounds", "1"),
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
        "profile",
        ("-m", "bench", "profile", "--out", OUT),
        ("-m", "bench", "profile", "--out", OUT, "--size", "rehearsal"),
        needs=("deepspeed",),
    ),
)


def environment(links: Path, out: Path, rehearse: bool) -> dict[str, str]:
    """Of the steps: the checkout's own packages first, whether it is installed or not. Of several GPUs the first, since
    a peer would share out its batch among all it sees; for a rehearsal none."""
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
    """What can be run and has not ended well: the tests, then what was never tried, then the others again."""
    left = [s for s in STEPS if done.get(s.name, {}).get("ended") != "well" and not s.lacks()]
    return sorted(left, key=lambda step: step.name != "tests" and step.name in done)


def tests_are_red(done: dict[str, dict]) -> bool:
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
            is_bench = step.name != "tests"  # whose numbers stand where a goal is missed
            ended = "well" if code == 0 or (is_bench and code == GOALS_MISSED) else "badly"
        except subprocess.TimeoutExpired:
            ended = "stopped"
        finally:  # workers that outlived it would hold the GPU's memory
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return {"name": step.name, "seconds": round(time.perf_counter() - began, 1), "ended": ended}


def summary(done: dict[str, dict], out: Path, device: str) -> str:
    lines = [f"# {device}", ""]
    if done.get("tests", {}).get("ended") != "well":
        lines += ["**The tests have not passed here: no number below is fit for quoting.**", ""]
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
    parser.add_argument("--minutes", type=float, default=9.0, help="the time box (default 9)")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="default gpu-results")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU")
    parser.add_argument("--anyway", action="store_true", help="measure though a test is red")
    options = parser.parse_args(argv)
    import torch

    if not options.rehearse and not torch.cuda.is_available():
        print("no CUDA device here; --rehearse runs the steps on the CPU", file=sys.stderr)
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
            if step.name != "tests" and tests_are_red(done) and not options.anyway:
                print("a test is red: nothing is measured (--anyway does)")
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
    remaining = [step.name for step in STEPS if step in pending(done)]
    print(f"remaining: {', '.join(remaining) or 'nothing'}; {options.out / 'summary.md'}")
    return 1 if remaining else 0
