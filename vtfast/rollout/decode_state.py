"""The rows that are being written: tensors that stay where they are while rows come, go and are captured in graphs.

Row r is row r of every tensor. Live rows stand in front. Rows behind them are blank: a step may run over them too,
since they write to the scrap page of the cache and the scrap row of the output.

Shapes: R rows in flight, S rows of the whole call, L most tokens of a completion.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LAST_GROUP = 2**31 - 1


@dataclass
class Rows:
    """State of a decode step, on the device."""

    token: Tensor
    """[R] the newest token, not in the cache yet."""
    length: Tensor
    """[R] tokens in the cache."""
    delta: Tensor
    """[R] M-RoPE angle of the next token minus its place in the sequence."""
    table: Tensor
    """[R, pages] int32, pages in order; 0 where there is none."""
    group: Tensor
    """[R] rows of a prompt share a number; non-decreasing."""
    shared: Tensor
    """[R] leading pages that belong to the whole group."""
    key: Tensor
    """[R] key of the row's randomness."""
    emitted: Tensor
    """[R] tokens written so far."""
    place: Tensor
    """[R] row of the output."""
    active: Tensor
    """[R] bool; a finished row runs along, changing nothing, until it is taken out."""

    @staticmethod
    def blank(rows: int, pages: int, device: torch.device | str) -> Rows:
        numbers = torch.zeros(8, rows, dtype=torch.int64, device=device)
        names = ("token", "length", "delta", "group", "shared", "key", "emitted", "place")
        table = torch.zeros(rows, pages, dtype=torch.int32, device=device)
        active = torch.zeros(rows, dtype=torch.bool, device=device)
        blank = Rows(**dict(zip(names, numbers, strict=True)), table=table, active=active)
        blank.clear()
        return blank

    def clear(self) -> None:
        for value in vars(self).values():
            value.zero_()
        self.group.fill_(LAST_GROUP)

    def slice(self, start: int, stop: int) -> Rows:
        """Rows start .. stop, as views."""
        return Rows(**{name: value[start:stop] for name, value in vars(self).items()})

    def copy(self) -> Rows:
        return Rows(**{name: value.clone() for name, value in vars(self).items()})

    def write(self, rows: Rows) -> None:
        """Take over the values of as many `rows`."""
        for name, value in vars(rows).items():
            vars(self)[name].copy_(value)

    def keep(self, rows: Tensor) -> None:
        """Move some rows, in order, to the front; the others become blank."""
        kept = Rows(**{name: value[rows] for name, value in vars(self).items()})
        self.slice(0, len(rows)).write(kept)
        self.slice(len(rows), len(self.token)).clear()


@dataclass
class Output:
    """What the rows of a call have written."""

    tokens: Tensor
    """[S + 1, L + 1] int64; the last row is scrap, and so is what stands behind a row's end."""
    logps: Tensor
    """[S + 1, L + 1] fp32"""

    @staticmethod
    def empty(rows: int, tokens: int, device: torch.device | str) -> Output:
        shape = rows + 1, tokens + 1
        ids = torch.zeros(shape, dtype=torch.int64, device=device)
        return Output(ids, torch.zeros(shape, device=device))

    def place(self, rows: Rows) -> Tensor:
        """[R] row that each row may write to."""
        return torch.where(rows.active, rows.place, len(self.tokens) - 1)

    def commit(self, rows: Rows, token: Tensor, logp: Tensor, limit: Tensor, eos: Tensor) -> None:
        """Write down each live row's new token, and end the rows that this finishes. Reads nothing on the host.

        `limit`: [], most tokens of a completion. `eos`: [n], tokens that end one.
        """
        where = self.place(rows), rows.emitted
        self.tokens.index_put_(where, token)
        self.logps.index_put_(where, logp)
        rows.token.copy_(token)
        rows.emitted.add_(rows.active)
        ended = (token[:, None] == eos).any(-1).logical_or_(rows.emitted >= limit)
        rows.active.logical_and_(ended.logical_not_())
