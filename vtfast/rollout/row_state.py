"""State of the running rows: tensors that keep their addresses while rows come, go and are captured in graphs.

Row r is row r of every tensor. Running rows come first. The rows behind them are padding: a step may run over them too,
since they write to the scratch page of the cache and the scratch row of the output.

Shapes: R running rows, S rows of the whole call, L longest completion.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PADDING_GROUP = 2**31 - 1
"""Group of padding rows: sorts behind every prompt's."""


@dataclass
class RowState:
    """State of a decode step, on the device."""

    token: Tensor
    """[R] the newest token, not in the cache yet."""
    length: Tensor
    """[R] tokens in the cache."""
    rope_delta: Tensor
    """[R] M-RoPE angle of the next token minus its place in the sequence."""
    block_table: Tensor
    """[R, pages] int32, pages in order, padded with 0."""
    group: Tensor
    """[R] rows of a prompt share a number; non-decreasing."""
    num_shared_pages: Tensor
    """[R] leading pages that belong to the whole group."""
    row_key: Tensor
    """[R] key of the row's randomness."""
    num_generated: Tensor
    """[R] tokens generated so far."""
    output_row: Tensor
    """[R] row of the output."""
    active: Tensor
    """[R] bool; a finished row stays in the batch, changing nothing, until `finish_rows`."""

    @staticmethod
    def empty(rows: int, pages: int, device: torch.device | str) -> RowState:
        numbers = torch.zeros(8, rows, dtype=torch.int64, device=device)
        names = ("token", "length", "rope_delta", "group", "num_shared_pages", "row_key", "num_generated", "output_row")
        block_table = torch.zeros(rows, pages, dtype=torch.int32, device=device)
        active = torch.zeros(rows, dtype=torch.bool, device=device)
        state = RowState(**dict(zip(names, numbers, strict=True)), block_table=block_table, active=active)
        state.clear()
        return state

    def clear(self) -> None:
        """Make all rows padding."""
        for value in vars(self).values():
            value.zero_()
        self.group.fill_(PADDING_GROUP)

    def slice(self, start: int, stop: int) -> RowState:
        """Return rows start .. stop, as views."""
        return RowState(**{name: value[start:stop] for name, value in vars(self).items()})

    def clone(self) -> RowState:
        return RowState(**{name: value.clone() for name, value in vars(self).items()})

    def copy_from(self, rows: RowState) -> None:
        """Overwrite these rows with as many others."""
        for name, value in vars(rows).items():
            vars(self)[name].copy_(value)

    def compact(self, running: Tensor) -> None:
        """Move the rows `running` to the front, in order; the others become padding."""
        kept = RowState(**{name: value[running] for name, value in vars(self).items()})
        self.slice(0, len(running)).copy_from(kept)
        self.slice(len(running), len(self.token)).clear()


@dataclass
class OutputBuffer:
    """The tokens and log-probs of all rows of a call."""

    tokens: Tensor
    """[S + 1, L + 1] int64; the last row is scratch, and so is everything behind a row's end."""
    logps: Tensor
    """[S + 1, L + 1] fp32"""

    @staticmethod
    def empty(rows: int, tokens: int, device: torch.device | str) -> OutputBuffer:
        shape = rows + 1, tokens + 1
        ids = torch.zeros(shape, dtype=torch.int64, device=device)
        return OutputBuffer(ids, torch.zeros(shape, device=device))

    def writable_row(self, rows: RowState) -> Tensor:
        """Return [R], the row of the output that each row writes to: the scratch row unless it is active."""
        return torch.where(rows.active, rows.output_row, len(self.tokens) - 1)

    def append(self, rows: RowState, token: Tensor, logp: Tensor, limit: Tensor, eos: Tensor) -> None:
        """Write each active row's new token, and deactivate the rows that this finishes. Reads nothing on the host.

        `limit`: [], longest completion. `eos`: [n], tokens that end one.
        """
        where = self.writable_row(rows), rows.num_generated
        self.tokens.index_put_(where, token)
        self.logps.index_put_(where, logp)
        rows.token.copy_(token)
        rows.num_generated.add_(rows.active)
        ended = (token[:, None] == eos).any(-1).logical_or_(rows.num_generated >= limit)
        rows.active.logical_and_(ended.logical_not_())
