"""The exceptions a user is meant to read."""


class UserError(ValueError):
    """Bad input of a user: a file, a row, a flag, a name.

    The command line prints the message alone and exits with code 2, so a message names the file,
    row or flag and says what to do next. Anything else that is raised is a bug of ours and keeps
    its traceback.
    """


class SharedError(UserError):
    """One that all ranks raise at the same place, so that they can still do something together."""


class Stopped(Exception):
    """A run that was asked to stop (SIGTERM and the like) has saved and ends. The command line prints the message and
    exits with code 75, by which a scheduler knows that there is more to do."""


class RankError(UserError):
    """One that a single rank meets: it is printed by that rank, unless the others have heard of it (`watchdog`)."""
