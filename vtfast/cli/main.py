"""The command line: `vtfast COMMAND`, and `python train.py` for `vtfast train`.

Nothing heavy is imported before a command needs it, so that help and errors come at once.
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
from vtfast.utils.text import first_line

COMMANDS = {
    "train": "train a model with GRPO (the same as python train.py)",
    "sft": "fine-tune a model on the answers of its data",
    "data": "describe a data set (vtfast data inspect PATH)",
    "eval": "evaluate a model on CV-Bench, BLINK, VSR or SAT",
    "report": "write one HTML page about a run, or about several side by side",
    "migrate": "turn settings of TRL, R1-V or EasyR1 into a YAML file for --config",
    "make-base": "train the demo's base model from random weights",
}
"""Each is `vtfast/cli/NAME.py`."""
PACKAGES = ("numpy", "PIL", "pyarrow", "torch", "tqdm", "transformers", "vtfast_kernels", "yaml")
"""If one is missing, vtfast was not installed for this Python."""
BAD_INPUT = 2
"""Exit code of every error in the input. `RANK_LOST` (4): the rank ends because another one died, failed or hung."""
STOPPED = 75
"""Exit code of a run that was asked to stop and has saved, to be started again (EX_TEMPFAIL of sysexits.h)."""
INTERRUPTED = 130
"""Exit code after Ctrl-C."""
CLOSED_OUTPUT = 141
"""Exit code if standard output was closed, as `| head` does (128 + SIGPIPE)."""
MAKE_ROOM, NAME_ANOTHER = "make room, and start it again", "name another path, or let this user use it"
REMEDIES = {
    errno.ENOSPC: MAKE_ROOM,
    errno.EDQUOT: MAKE_ROOM,
    errno.EFBIG: MAKE_ROOM,
    errno.EACCES: NAME_ANOTHER,
    errno.EPERM: NAME_ANOTHER,
    errno.EROFS: NAME_ANOTHER,
}
"""What a user does about an error of the file system."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. A UserError becomes one line on standard error."""
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
        sys.stdout.flush()  # raises BrokenPipeError here, and not when the interpreter ends
        return code
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
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            watchdog.fail("standard output is closed", CLOSED_OUTPUT)
            return CLOSED_OUTPUT
        user_error = _as_user_error(error)
        if user_error is not None:
            return _report(user_error)
        watchdog.fail(f"{type(error).__name__}: {error}", RANK_LOST)
        raise


def _as_user_error(error: Exception) -> UserError | None:
    """The error if it is the user's to solve, like a full disk; None for a bug."""
    if isinstance(error, UserError):
        return error
    # a full disk is told without a file name, too; anything else without one may be a bug
    if (
        isinstance(error, OSError)
        and error.errno in REMEDIES
        and (error.filename or REMEDIES[error.errno] == MAKE_ROOM)
    ):
        file = f"{error.filename}: " if error.filename else ""
        return RankError(f"{file}{error.strerror}; {REMEDIES[error.errno]}")
    if isinstance(error, ModuleNotFoundError) and error.name in PACKAGES:
        return UserError(
            f"{error.name} is not installed for {sys.executable}; `make setup` installs everything into .venv, and"
            " `. .venv/bin/activate` activates it"
        )
    # an import of torch only for this would take seconds
    if isinstance(error, MemoryError | RuntimeError) and "torch" in sys.modules:
        from vtfast.utils.out_of_memory import WHAT_TO_LOWER, is_out_of_memory

        if is_out_of_memory(error):
            return RankError(
                f"{watchdog.progress()}: out of memory ({first_line(error)}); {WHAT_TO_LOWER}. What a run has saved is"
                " resumed with --resume_from_checkpoint last"
            )
    return None


def _report(error: UserError) -> int:
    """Print the error once a machine, and tell the other ranks."""
    others_know = watchdog.fail(str(error), BAD_INPUT)
    rank = int(os.environ.get("RANK", 0))
    print_here = isinstance(error, RankError) and not others_know
    if print_here or os.environ.get("LOCAL_RANK", "0") == "0":
        text = message(error) + (f" (rank {rank})" if rank else "")
        print(f"error: {text}", file=sys.stderr)
    return BAD_INPUT


def _output_is_closed() -> bool:
    """Whether standard output is a closed pipe. If so, it is replaced by /dev/null, so that the interpreter's last
    flush does not fail again."""
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
    module = importlib.import_module(f"vtfast.cli.{command.replace('-', '_')}")
    return module.run(arguments)


def _prepare() -> None:
    """Set environment and logging before torch is imported. vtfast logs on rank 0, the libraries log errors only."""
    rank = os.environ.get("RANK", "0")
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.ERROR)
    logging.getLogger("vtfast").setLevel(logging.INFO if rank == "0" else logging.ERROR)
    # OpenMP threads that spin while they wait make a step ten times slower when another process uses a core.
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
