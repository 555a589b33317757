"""Who is to blame: a table of what each rank last said of itself, and the rules that read it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

RANK_LOST = 4
"""Exit code of a rank that ends because another one died, failed or hung."""


@dataclass
class State:
    """What a rank says of itself."""

    step: int = 0
    phase: str = "start-up"
    beats: int = 0
    """Counts progress; what matters is that it changes."""
    patient: bool = True
    """No progress is expected: the phase is one long call."""
    waiting: bool = False
    """In a collective, for other ranks."""
    where: str = ""
    """File, line and function that the main thread is in."""

    def __str__(self) -> str:
        return f"step {self.step}, {self.phase}" if self.step else self.phase

    as_dict = asdict


@dataclass(frozen=True)
class Member:
    """A rank and where it runs."""

    rank: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"


@dataclass(frozen=True)
class Verdict:
    """Why the run ends. Sent to all ranks."""

    rank: int
    """The first to blame."""
    message: str
    code: int
    """Exit code of the other ranks."""
    spoken: bool = False
    """Whether that rank reports by itself, because it failed with an exception."""

    as_dict = asdict


@dataclass
class _Row:
    state: State
    heard: float
    progressed: float
    left: bool = False


class Judge:
    """Reads the reports of the ranks in `members`. `now` is its clock, in seconds, which its owner sets."""

    def __init__(self, members: list[Member], limit: float, grace: float = 0.0) -> None:
        """`limit`: seconds without progress, or without a report, after which a rank counts as hung; `grace`: more of
        them, for one who is to leave the word to another."""
        self.limit, self.grace = limit, grace
        self.now = now = 0.0
        self.members = {member.rank: member for member in members}
        self.rows = {member.rank: _Row(State(), now, now) for member in members}

    def report(self, rank: int, state: State) -> None:
        row = self.rows[rank]
        before = row.state
        if (state.beats, state.phase, state.step) != (before.beats, before.phase, before.step):
            row.progressed = self.now
        elif before.waiting or before.patient:
            row.progressed = self.now  # no progress is expected; its time begins when that is over
        row.state, row.heard = state, self.now

    def leave(self, rank: int) -> None:
        self.rows[rank].left = True

    def failed(self, rank: int, reason: str, code: int) -> Verdict:
        message = f"{self.members[rank]} failed in {self.rows[rank].state}: {reason}"
        return Verdict(rank, message, code, spoken=True)

    def closed(self, rank: int, unreachable: str = "") -> Verdict | None:
        """The connection ended; `unreachable`: why, where that was the network's doing. None for a rank that left."""
        row = self.rows[rank]
        if row.left:
            return None
        fate = f"cannot be reached any more ({unreachable})" if unreachable else "died"
        ago = f"{self.now - row.heard:.0f} s ago"
        message = f"{self.members[rank]} {fate}; last heard {ago} in {row.state}"
        return Verdict(rank, message, RANK_LOST)

    def overdue(self) -> Verdict | None:
        """The ranks that hang, if any does: those that are not heard before those that are heard and do not get on.

        A rank that hangs soon has others waiting for it in a collective that does not say so. So the one that stood
        still first comes first, and the others that stand still are named with it."""
        rows = {rank: row for rank, row in self.rows.items() if not row.left}
        silent = {r: self.now - row.heard for r, row in rows.items() if self._over(row.heard)}
        if silent:
            lines = [
                f"{self.members[r]} has not been heard for {silent[r]:.0f} s (--rank_timeout {self.limit:g}); it was"
                f" in {rows[r].state}"
                for r in sorted(silent, key=silent.get, reverse=True)
            ]
            return Verdict(max(silent, key=silent.get), "; ".join(lines), RANK_LOST)
        still = {rank: self.now - row.progressed for rank, row in rows.items()}
        if not any(self._over(rows[rank].progressed) for rank in still):
            return None
        blamed = [r for r in sorted(still, key=still.get, reverse=True) if still[r] > self.limit / 2]
        lines = [
            f"{self.members[r]} has been in {rows[r].state} for {still[r]:.0f} s without progress"
            f" (--rank_timeout {self.limit:g})" + (f", at {rows[r].state.where}" if rows[r].state.where else "")
            for r in blamed
        ]
        return Verdict(blamed[0], "; ".join(lines), RANK_LOST)

    def _over(self, since: float) -> bool:
        return self.now - since > self.limit + self.grace
