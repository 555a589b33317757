"""The command line, one file a command: `run(arguments) -> exit code`. Start with `main.py`."""

from vtfast.cli.main import main

__all__ = ["main"]
