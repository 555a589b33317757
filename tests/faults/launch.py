"""Starts a trainer on all ranks and waits for it: as users do, or by forks of a process that has imported all."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from . import start
from .places import Moment, Orders

ROOT = Path(__file__).parents[2]
PATIENCE = 300.0
"""Seconds that one start may take."""
GRACE = 30.0
"""Seconds between SIGTERM and SIGKILL for the other ranks when one has died, as DeepSpeed's launcher has it."""
MARK = "VTFAST_TRIAL"
"""Environment variable that marks the processes of a start, to find those left running."""


@dataclass
class Ended:
    """How a start ended."""

    codes: list[int]
    """Exit codes of the ranks; negative: the signal. For DeepSpeed's launcher, only its own."""
    seconds: float
    sessions: set[int]
    hung: bool = False
    """Whether it had to be killed for taking too long."""

    @property
    def finished(self) -> bool:
        return not any(self.codes)


class Launcher:
    """Starts trainers. What a start prints goes to `output` beside the run folder, what happened to `run.journal`."""

    def __init__(self) -> None:
        path = os.pathsep.join(dict.fromkeys([str(ROOT), *(part for part in sys.path if part)]))
        binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = {
            "PYTHONPATH": path,
            "PATH": binaries,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([f"{__package__}.preloaded"])
        first = self._fork(os.getpid)  # which waits until all is imported
        first.join()

    def ordinary(self, ranks: int, flags: Sequence[str], run: Path, moment: Moment | None = None) -> Ended:
        """`python train.py`, or DeepSpeed's launcher and `train.py`. With a moment, `start` is run in its place."""
        script, planted = [str(ROOT / "train.py")], {}
        if moment is not None:
            script = ["--module", f"{__package__}.start", "train"]
            planted = Orders(str(journal(run)), str(run), moment).encode()
        command = [sys.executable, *script]
        if ranks > 1:
            launcher = ["deepspeed", "--num_accelerators", str(ranks)]
            command = [*launcher, "--master_port", str(_free_port()), *script]
        environment = os.environ | self.environment | planted | {MARK: str(run)}
        began, hung = time.monotonic(), False
        with (run.parent / "output").open("a") as output:
            process = subprocess.Popen(
                [*command, *flags],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                hung = True
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        return Ended([process.returncode], time.monotonic() - began, {process.pid}, hung)

    def forked(
        self, ranks: int, flags: Sequence[str], run: Path, moment: Moment | None = None, kill_after: float | None = None
    ) -> Ended:
        """A fork for each rank. `kill_after`: seconds, after which all ranks are killed."""
        common = Orders(str(journal(run)), str(run), moment).encode() | {MARK: str(run)}
        if ranks > 1:
            port = str(_free_port())
            common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
        began = time.monotonic()
        processes = []
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            what = (["train", *flags], common | own, str(run.parent), str(run.parent / "output"))
            processes.append(self._fork(start.forked, *what))
        try:
            hung = _see_out(processes, kill_after)
        finally:
            for process in processes:
                process.kill()
                process.join()
        codes = [process.exitcode for process in processes]
        return Ended(codes, time.monotonic() - began, {process.pid for process in processes}, hung)

    def _fork(self, function, *arguments) -> ForkServerProcess:
        process = self.context.Process(target=function, args=arguments)
        with _replaced(os.environ, self.environment):  # the first fork starts the fork server
            process.start()
        return process


def journal(run: Path) -> Path:
    """The file in which trainers write down what happened to a run."""
    return run.with_name(f"{run.name}.journal")


def _see_out(ranks: Sequence[ForkServerProcess], kill_after: float | None) -> bool:
    """Wait for the ranks. One that dies takes the others along, as under DeepSpeed's launcher: it looks once a second,
    asks by SIGTERM and kills later. Returns whether any took longer than it may."""
    limit = time.monotonic() + (PATIENCE if kill_after is None else kill_after)
    alive, asked = list(ranks), False
    while alive:
        if not wait([process.sentinel for process in alive], max(0.0, limit - time.monotonic())):
            for process in alive:
                process.kill()
            return asked or kill_after is None
        alive = [process for process in alive if process.exitcode is None]
        if alive and not asked and any(process.exitcode for process in ranks):
            asked = True
            wait([process.sentinel for process in alive], 1.0)
            for process in alive:
                process.terminate()
            limit = time.monotonic() + GRACE
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def _replaced(mapping: MutableMapping[str, str], values: Mapping[str, str]) -> Iterator[None]:
    before = dict(mapping)
    mapping.update(values)
    try:
        yield
    finally:
        mapping.clear()
        mapping.update(before)
