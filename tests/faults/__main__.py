"""`python -m tests.faults`: kill and resume runs, and report what was lost. Exit code 1 if anything was."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from .campaign import Campaign, Result
from .plan import KINDS, plan


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--trials", type=int, default=40, help="how many (default 40)")
    parser.add_argument("--seed", type=int, default=0, help="of every moment, damage and choice")
    parser.add_argument("--ranks", default="1,2", help="numbers of ranks, in turn (default 1,2)")
    parser.add_argument("--only", help="numbers of the trials to run, from 0, instead of all")
    parser.add_argument("--keep", metavar="DIR", type=Path, help="leave the run folders there")
    given = parser.parse_args(arguments)
    trials = plan(given.trials, given.seed, [int(ranks) for ranks in given.ranks.split(",")])
    if given.only:
        trials = [trials[int(number)] for number in given.only.split(",")]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no trainer outlives the campaign
    with tempfile.TemporaryDirectory(prefix="vtfast-faults-") as scratch:
        campaign = Campaign(given.keep or Path(scratch))
        results = []
        bar = tqdm(trials, desc="faults", unit="trial")
        for trial in bar:
            bar.set_postfix_str(f"{trial.kind.name}, {trial.settings.name}")
            results.append(result := campaign.run(trial))
            for line in result.problems:
                where = f"trial {trial.number} ({trial.kind.name}, {trial.settings.name})"
                bar.write(f"{where}: {line}")
    print(table(results))
    failed = [str(result.trial.number) for result in results if result.problems]
    if failed:
        again = f"--trials {given.trials} --seed {given.seed} --ranks {given.ranks}"
        print(f"to look closer: python -m tests.faults {again} --only {','.join(failed)} --keep DIR")
    return 1 if failed else 0


def table(results: Sequence[Result]) -> str:
    """A line for each kind of fault, and one for all."""
    columns = ("trials", "faults", "starts", "lost", "differing", "other", "seconds")
    lines = [f"{'kind':<30}" + "".join(f"{name:>11}" for name in columns)]
    groups = [(kind.name, [r for r in results if r.trial.kind is kind]) for kind in KINDS]
    for name, group in [*groups, ("all", list(results))]:
        if group:
            numbers = (
                len(group),
                sum(r.struck for r in group),
                sum(r.starts for r in group),
                sum(len(r.lost) for r in group),
                sum(len(r.differing) for r in group),
                sum(len(r.other) for r in group),
                round(sum(r.seconds for r in group)),
            )
            lines.append(f"{name:<30}" + "".join(f"{number:>11}" for number in numbers))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
