"""`python -m tests.malformed [FACTOR]`: the whole campaign, FACTOR times as long."""

import logging
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "helpers")]

from malformed import REFUSED, SKIPPED, WORKS, campaign  # noqa: E402
from malformed.table import KINDS  # noqa: E402


def main(factor: float) -> None:
    print(f"{'inputs':40} {'tried':>6} {WORKS:>8} {SKIPPED:>8} {REFUSED:>8}")
    logging.getLogger("vtfast").disabled = True
    total = 0
    for kind in KINDS:
        ended = campaign(kind, factor)
        total += ended.total()
        print(f"{kind.name:40} {ended.total():6} {ended[WORKS]:8} {ended[SKIPPED]:8} {ended[REFUSED]:8}", flush=True)
    print(f"{'all':40} {total:6}")


main(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0)
