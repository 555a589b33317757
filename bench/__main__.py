"""`python -m bench NAME [options]`: run bench/NAME.py; without a name, list the benches."""

import ast
import importlib
import os
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def benches() -> dict[str, str]:
    """Name -> the first line of its docstring. Nothing is imported, as some need packages that are not installed."""
    files = (path for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))
    lines = {path.stem: ast.get_docstring(ast.parse(path.read_text())) for path in sorted(files)}
    return {name: text.split("\n")[0].split(": ", 1)[1] for name, text in lines.items()}


def main(argv: list[str]) -> int:
    names = benches()
    if not argv:
        print("usage: python -m bench NAME [options]")
        for name, line in names.items():
            print(f"  {name:<13}{line}")
        return 0
    if argv[0] not in names:
        print(f"bench {argv[0]}: unknown; the benches are {', '.join(names)}", file=sys.stderr)
        return 2
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `vtfast` sets it; torch reads it when imported
    return importlib.import_module(f"bench.{argv[0]}").main(argv[1:]) or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
