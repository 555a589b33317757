"""Samples that a run leaves out, and why: a line each in the run folder's skipped.jsonl."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vtfast.data import Sample
from vtfast.distributed.ranks import Ranks
from vtfast.utils.errors import SharedError, UserError

log = logging.getLogger("vtfast")
FILE = "skipped.jsonl"


class SkipLog:
    """Collects skipped samples of this rank until `flush` writes those of all ranks."""

    def __init__(self, on_bad_sample: str = "skip") -> None:
        """`on_bad_sample`: "skip", or "error" to stop at the first one."""
        self.is_strict = on_bad_sample == "error"
        self.pending: list[dict] = []

    def add(self, sample: Sample, reason: str | Exception, step: int) -> None:
        """Skip a sample in an optimizer step. Under `--on_bad_sample error` the next `flush` stops the run."""
        log.warning("step %d: skipped %s: %s", step, sample.where, reason)
        self.pending.append({"step": step, "row": sample.row, "where": sample.where, "reason": str(reason)})

    def add_rows(self, source: str, rows: Sequence[tuple[int, str]], where: Mapping[int, str]) -> None:
        """Rows of a data set that were skipped when it was loaded: (row number, reason), and where each row stands."""
        self.pending += [
            {"step": 0, "source": source, "row": row, "where": where[row], "reason": reason} for row, reason in rows
        ]

    def drop_invalid(
        self, samples: Sequence[Sample], source: str, problem_of: Callable[[Sample], str | None]
    ) -> list[Sample]:
        """Samples without a problem. The others are counted and named in the log.

        Raises UserError for the first one under `--on_bad_sample error`, and if no sample is left."""
        good, bad = [], []
        for sample in samples:
            problem = problem_of(sample)
            if problem is None:
                good.append(sample)
                continue
            bad.append(f"{sample.where}: {problem}")
            self.add_rows(source, [(sample.row, problem)], {sample.row: sample.where})
            if self.is_strict:
                raise UserError(f"{source}: {bad[0]}")
        if bad:
            log.warning("%s: skipped %d of %d samples: %s", source, len(bad), len(samples), "; ".join(bad[:3]))
        if not good:
            raise UserError(f"{source}: none of its {len(samples)} samples can be used; {bad[0]}")
        return good

    def pop(self) -> list[dict]:
        popped, self.pending = self.pending, []
        return popped

    def write(self, folder: Path, rows: Sequence[dict]) -> None:
        if rows:
            with (folder / FILE).open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)

    def flush(self, ranks: Ranks, folder: Path) -> int:
        """Write what any rank skipped since the last call; the number of samples. Collective.

        Raises SharedError on all ranks under `--on_bad_sample error`."""
        rows = [row for part in ranks.gather(self.pop()) for row in part]
        if ranks.is_main:
            self.write(folder, rows)
        if rows and self.is_strict:
            raise SharedError("step {step}, {where}: {reason}".format(**rows[0]))
        return len(rows)
