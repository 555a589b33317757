"""A campaign of bad and hostile inputs: whatever a file or a flag says, it ends in one of three ways.

    works      the input was sound after all
    skipped    a row was left out, and its number told
    refused    a UserError of one line that names the file, row or flag

Never another exception, never a hang, never a file half written. `python -m tests.malformed [FACTOR]` tries every kind
and prints how many inputs of each ended how; `tests/campaigns/test_malformed.py` does so in the test suite. A kind of
input is a line in `KINDS`: a strategy that draws inputs and a function that enters one. The draws are the same each
time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import resource
import shutil
import signal
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

from vtfast.utils.errors import UserError
from vtfast.utils.terminal import message

SECONDS = 120
"""For one input: far more than any needs, on a machine that does other things too."""
MEMORY = 2 << 30
"""Bytes by which one input may raise the most memory that the process ever had."""
NAMED = re.compile(r"--\w|\brow \d|/\S|\w\.(?:ya?ml|jsonl?|parquet|txt)\b|\w:\w+")
"""What a message names: a flag, a row, a path, a file."""
WORKS, SKIPPED, REFUSED = "works", "skipped", "refused"


@dataclass(frozen=True)
class Kind:
    """One kind of input."""

    name: str
    inputs: SearchStrategy[Any]
    enter: Callable[[Any, Path], str]
    """Gives an input to the entry point, with an empty folder to put it in; -> WORKS or SKIPPED, or a UserError."""
    count: int
    """Inputs of the short campaign."""


class Hang(BaseException):
    """An input took longer than SECONDS. No `except Exception` catches it."""


def campaign(kind: Kind, factor: float = 1.0) -> Counter[str]:
    """Enter the inputs of a kind; -> how many different ones ended how. Raises what must not come out, for the
    simplest input that does it."""
    endings: dict[bytes, str] = {}

    @settings(
        max_examples=max(1, round(kind.count * factor)),
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(kind.inputs)
    def enter(given_input: Any) -> None:
        ending = verdict(kind, given_input)
        endings[hashlib.blake2b(repr(given_input).encode("utf-8", "replace")).digest()] = ending

    enter()
    return Counter(endings.values())


def verdict(kind: Kind, given_input: Any) -> str:
    """How one input ends. Raises AssertionError for a message that names nothing and for files left behind."""
    folder = Path(tempfile.mkdtemp(prefix="malformed-"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with at_most(SECONDS):
            return kind.enter(given_input, folder)
    except UserError as error:
        for problem in getattr(error, "problems", [error]):
            text = message(problem)
            kinds = {c for c in text if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")}
            assert not kinds - {"\t"}, f"steers the terminal: {text!r}"
            assert NAMED.search(text), f"names nothing: {text}"
        return REFUSED
    finally:
        left = [path.name for path in folder.rglob("*.partial")]
        shutil.rmtree(folder)
        assert not left, f"left behind: {left}"
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) << 10
        assert grown < MEMORY, f"took {grown} bytes"


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise Hang(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def command(*arguments: str) -> str:
    """A call of the command line, in this process; its error as a UserError."""
    import io

    from vtfast.cli.main import BAD_INPUT, main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    if code == BAD_INPUT:
        said = err.getvalue().splitlines()
        (first,) = (place for place, line in enumerate(said) if line.startswith("error: "))
        problems = [line.strip() for line in said[first + 1 :] if line.startswith("  ")]
        error = UserError(said[first].removeprefix("error: "))
        error.problems = problems or [error]
        raise error
    assert code == 0, f"exit code {code}: {err.getvalue()}"
    return WORKS


def link_all(source: Path, folder: Path) -> Path:
    """The files of `source` in `folder`, as links."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        os.symlink(file, folder / file.name)
    return folder
