"""Exceptions whose messages are for the user."""

from collections.abc import Iterator
from contextlib import contextmanager

from vtfast.utils.text import first_line


class UserError(ValueError):
    """Bad input: a file, a row, a flag, a name.

    The command line prints the message alone and exits with code 2, so the message names the file, row or flag and says
    what to do. Any other exception is a bug in vtfast and keeps its traceback.
    """


class SharedError(UserError):
    """Raised by all ranks at the same point, so that collectives are still possible."""


class RankError(UserError):
    """Raised by one rank alone, which prints it unless the watchdog has told the other ranks."""


@contextmanager
def error_prefix(where: str, error_type: type[UserError] = UserError) -> Iterator[None]:
    """Puts `where`, such as a file and row, in front of the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise error_type(f"{where}: {error}") from error


@contextmanager
def user_error(what: str) -> Iterator[None]:
    """Turns any exception of the block into a UserError "`what` (its first line)". For calls of libraries that raise
    exceptions of any type for files that they do not expect."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} ({type(error).__name__}: {first_line(error)})") from error


class Stopped(Exception):
    """A run that received a signal such as SIGTERM has saved and ends. The command line prints the message and exits
    with code 75, which tells a scheduler to start it again."""
