"""The ranks of a run (one process each, one device each) and the objects they exchange."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from vtfast.distributed import watchdog
from vtfast.utils.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's rank, the number of ranks, and this rank's device. All methods are collective."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """`value` of every rank, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with watchdog.waiting():
            dist.all_gather_object(values, value)
        return values

    def from_main(self, value: T) -> T:
        """Rank 0's `value`, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        with watchdog.waiting():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        if self.size > 1:
            with watchdog.waiting():
                dist.barrier()

    def on_main(self, work: Callable[[], T]) -> T:
        """`work()`, done by rank 0 alone; every rank returns its result or raises its UserError."""
        result = self.from_main(_result_or_error(work) if self.is_main else None)
        if isinstance(result, UserError):
            raise result
        return cast(T, result)

    def gather_rows(self, work: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """The rows that `work()` returns on each rank, sorted by "index"; every rank raises the first UserError."""
        rows: list[dict[str, Any]] = []
        for result in self.gather(_result_or_error(work)):
            if isinstance(result, UserError):
                raise result
            rows += result
        return sorted(rows, key=lambda row: row["index"])


def _result_or_error(work: Callable[[], T]) -> T | UserError:
    """A UserError is returned, so that it can be sent; so is an OSError, as a UserError. Others propagate."""
    try:
        return work()
    except (UserError, OSError) as error:
        if isinstance(error, UserError):
            return error
        return UserError(f"{error.filename}: {error.strerror}" if error.filename else str(error))
