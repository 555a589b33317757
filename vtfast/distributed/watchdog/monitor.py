"""Which rank is to blame: the last report of every rank, and the rules that read them."""

from __future__ import annotations

from dataclasses import dataclass

RANK_LOST = 4
"""Exit code of a rank that ends because another one died, failed or hung."""


@dataclass(frozen=True)
class Member:
    """A rank and the process that runs it."""

    rank: int
    host: str
    pid: int
    pid_namespace: int = 0
    """`pid` means something only to processes of the same host and namespace (containers may share a host name)."""

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"


@dataclass(frozen=True)
class Failure:
    """Why the run ends; the same on all ranks."""

    rank: int
    """The rank to blame."""
    message: str
    exit_code: int
    """Of the other ranks."""
    reported: bool = False
    """Whether that rank prints its own message, because it failed with an exception."""


@dataclass
class Report:
    """What a rank tells the others about itself."""

    number: int = 0
    """Counts the reports of this rank."""
    step: int = 0
    phase: str = "start-up"
    beats: int = 0
    """Changes with every piece of progress."""
    idle: bool = True
    """No progress is expected: the phase is one long call."""
    waiting: bool = False
    """In a collective, for other ranks."""
    where: str = ""
    """File, line and function that the main thread is in."""
    stopped: bool = False
    """The rank has ended its watch; it is not monitored any more."""
    failure: Failure | None = None
    """The exception that it ends with."""

    def __str__(self) -> str:
        return f"step {self.step}, {self.phase}" if self.step else self.phase


@dataclass
class _Row:
    report: Report
    heard: float
    """When the last report came."""
    progressed: float
    """When a report last showed progress."""


class Monitor:
    """The reports of all ranks. `now` is its clock in seconds, which its owner advances."""

    def __init__(self, members: list[Member], limit: float) -> None:
        """`limit`: seconds without progress, or without a report, after which a rank counts as hung."""
        self.members, self.limit, self.now = members, limit, 0.0
        self.rows = [_Row(Report(), self.now, self.now) for _ in members]

    def record(self, rank: int, report: Report) -> None:
        row = self.rows[rank]
        before = row.report
        moved = (report.beats, report.phase, report.step) != (before.beats, before.phase, before.step)
        if moved or before.waiting or before.idle:
            row.progressed = self.now  # while no progress is expected, the time does not start
        row.report, row.heard = report, self.now

    def died(self, rank: int) -> Failure:
        """The process of `rank` is gone. If its last report carries a failure, that is the reason."""
        row = self.rows[rank]
        message = f"{self.members[rank]} died; last heard {self.now - row.heard:.0f} s ago in {row.report}"
        return row.report.failure or Failure(rank, message, RANK_LOST)

    def silent(self, silence: dict[int, float]) -> Failure:
        """No report came from these ranks; `silence`: rank -> seconds."""
        ranks = sorted(silence, key=lambda rank: -silence[rank])
        lines = [
            f"{self.members[rank]} has not been heard for {silence[rank]:.0f} s (--rank_timeout {self.limit:g}); it was"
            f" in {self.rows[rank].report}"
            for rank in ranks
        ]
        return Failure(ranks[0], "; ".join(lines), RANK_LOST)

    def overdue(self) -> Failure | None:
        """The ranks that hang, if any: first those without a report, then those whose reports show no progress.

        A hung rank soon has others waiting for it in a collective, and not every collective is marked by `waiting`.
        So the rank that stopped first is named first, and the others without progress after it."""
        rows = {rank: row for rank, row in enumerate(self.rows) if not row.report.stopped}
        silence = {rank: self.now - row.heard for rank, row in rows.items() if self.now - row.heard > self.limit}
        if silence:
            return self.silent(silence)
        still = {rank: self.now - row.progressed for rank, row in rows.items()}
        if max(still.values(), default=0.0) <= self.limit:
            return None
        blamed = [rank for rank in sorted(still, key=lambda rank: -still[rank]) if still[rank] > self.limit / 2]
        lines = []
        for rank in blamed:
            report = rows[rank].report
            lines.append(
                f"{self.members[rank]} has been in {report} for {still[rank]:.0f} s without progress"
                f" (--rank_timeout {self.limit:g})" + (f", at {report.where}" if report.where else "")
            )
        return Failure(blamed[0], "; ".join(lines), RANK_LOST)
