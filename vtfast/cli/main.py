"""The command line: `vtfast COMMAND`, and `python train.py` for `vtfast train`.

Nothing heavy is imported before a command needs it, so that help and mistakes answer at once.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import logging
import os
import select
import sys
import warnings
from collections.abc import Sequence
from importlib import metadata

from vtfast.distributed import watchdog
from vtfast.distributed.watchdog import RANK_LOST
from vtfast.utils.errors import RankError, Stopped, UserError
from vtfast.utils.terminal import Formatter, message

COMMANDS = {
    "train": "train a model with GRPO (the same as python train.py)",
    "sft": "fine-tune a model on the answers of its data",
    "data": "tell what a data set holds (vtfast data inspect PATH)",
    "eval": "ask a model the questions of CV-Bench, BLINK, VSR or SAT, and score the answers",
    "report": "write one HTML page about a run, or about several side by side",
    "migrate": "turn settings of TRL, R1-V or EasyR1 into a YAML file for --config",
    "make-base": "train the demo's base model from nothing",
}
"""Each is `vtfast/cli/NAME.py`."""
PACKAGES = ("numpy", "PIL", "pyarrow", "torch", "tqdm", "transformers", "vtfast_kernels", "yaml")
"""Whose absence says that this Python is not the one that vtfast was installed for."""
BAD_INPUT = 2
"""Exit code of every error that is the input's fault. `RANK_LOST` (4) is that of a rank which ends because another one
died, failed or hung."""
STOPPED = 75
"""Exit code of a run that was asked to stop and has saved: to be started again (EX_TEMPFAIL of sysexits.h)."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a disk says that takes no more: no bug of ours, wherever it happens."""
DENIED = (errno.EACCES, errno.EPERM)
"""What the system says of a path that belongs to somebody else."""
INTERRUPTED = 130
"""Exit code after Ctrl-C."""
UNREAD = 141
"""Exit code where standard output was closed, as `| head` does (128 + SIGPIPE)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. A UserError becomes one line on standard error."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # `deepspeed --module vtfast` puts this in front of the command.
    if arguments and arguments[0].startswith("--local_rank="):
        del arguments[0]
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help", "--version"):
        print(_usage() if command != "--version" else f"vtfast {metadata.version('vtfast')}")
        return 0
    try:
        code = _run(command, arguments[1:])
        sys.stdout.flush()  # what a closed pipe says is met here, and not at the interpreter's end
        return code
    except UserError as error:
        return _refuse(error)
    except Stopped as stopped:
        watchdog.stop()
        if os.environ.get("RANK", "0") == "0":
            print(stopped, file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        watchdog.fail("interrupted", INTERRUPTED)
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            watchdog.fail("standard output is closed", UNREAD)
            return UNREAD
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            where = f"{error.filename}: " if error.filename else ""
            return _refuse(RankError(f"{where}{error.strerror}; make room, and start it again"))
        if isinstance(error, OSError) and error.errno in DENIED and error.filename:
            said = f"{error.filename}: {error.strerror}; name another path, or let this user use it"
            return _refuse(RankError(said))
        watchdog.fail(f"{type(error).__name__}: {error}", RANK_LOST)
        raise


def _refuse(error: UserError) -> int:
    heard = watchdog.fail(str(error), BAD_INPUT)
    rank = int(os.environ.get("RANK", 0))
    alone = isinstance(error, RankError) and not heard
    if alone or os.environ.get("LOCAL_RANK", "0") == "0":  # one voice a machine
        text = message(error) + (f" (rank {rank})" if rank else "")
        print(f"error: {text}", file=sys.stderr)
    return BAD_INPUT


def _nobody_reads() -> bool:
    """Whether standard output is a closed pipe. What is left for it goes nowhere then, so that the interpreter's end
    does not fail on it once more."""
    out, poll = sys.stdout.fileno(), select.poll()
    poll.register(out, select.POLLOUT)
    closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), out)
    return closed


def _run(command: str, arguments: Sequence[str]) -> int:
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, [*COMMANDS, "--help", "--version"], n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}"
        raise UserError(f"vtfast {command}: unknown command; {hint}")
    _prepare()
    try:
        module = importlib.import_module(f"vtfast.cli.{command.replace('-', '_')}")
        return module.run(arguments)
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES:
            raise
        raise UserError(
            f"{error.name} is not installed for {sys.executable}; `make setup` installs everything into .venv, and"
            " `. .venv/bin/activate` chooses that"
        ) from error


def _prepare() -> None:
    """Before torch is imported: how threads wait, and who speaks. Our own log on rank 0, of the libraries errors."""
    rank = os.environ.get("RANK", "0")
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.ERROR)
    logging.getLogger("vtfast").setLevel(logging.INFO if rank == "0" else logging.ERROR)
    # OpenMP threads that spin while they wait make a step ten times slower as soon as anything else runs on a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}   {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: vtfast COMMAND ...",
            "",
            *lines,
            "",
            "`vtfast COMMAND --help` lists a command's flags.",
            "example: vtfast train --recipe tiny-spatial --seed 1",
        ]
    )
