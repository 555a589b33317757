"""One start of a trainer with a fault planted in it.

As a module under DeepSpeed's launcher (`deepspeed --module tests.faults.start train ...`), or forked: importing torch,
DeepSpeed and transformers takes far longer than a dozen tiny steps, so one process imports them, starts no thread and
computes nothing, and every start is a fork of it (multiprocessing's fork server).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from .places import plant, read_orders


def train(arguments: Sequence[str]) -> int:
    """`vtfast` with `arguments` and what the environment orders. Returns the exit code."""
    from vtfast.cli.main import main

    watch = plant(read_orders(), int(os.environ.get("RANK", 0)))
    try:
        return main(arguments)
    finally:
        for place, count in watch.counts.items():
            watch.note("counted", watch.rank, place, count)


def forked(arguments: Sequence[str], environment: dict[str, str], folder: str, output: str) -> None:
    """The whole life of a forked trainer. `output`: the file that gets what it prints."""
    os.setsid()  # what it leaves running is known by its session
    os.chdir(folder)
    for name in [name for name in os.environ if name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]:
        del os.environ[name]
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.exit(train(arguments))


if __name__ == "__main__":
    script = sys.argv[1:]
    if script[0].startswith("--local_rank="):
        del script[0]
    sys.exit(train(script))
