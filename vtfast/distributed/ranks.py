"""The processes that train together, and what they tell each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from vtfast.config import RunConfig
from vtfast.distributed import heartbeat
from vtfast.utils.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among all of them."""

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
        with heartbeat.waiting():
            dist.all_gather_object(values, value)
        return values

    def from_main(self, value: T) -> T:
        """The value that rank 0 passed."""
        if self.size == 1:
            return value
        box = [value]
        with heartbeat.waiting():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        if self.size > 1:
            with heartbeat.waiting():
                dist.barrier()


def on_main(ranks: Ranks, make: Callable[[], T]) -> T:
    """What rank 0 makes of it, on all ranks; its UserError, too, is everyone's. Collective."""
    made: Any = None
    if ranks.is_main:
        try:
            made = make()
        except UserError as error:
            made = error
        except OSError as error:
            made = UserError(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    made = ranks.from_main(made)
    if isinstance(made, UserError):
        raise made
    return made


def gather_rows(ranks: Ranks, work: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of all ranks in the order of the data. A UserError of one rank is raised on all: none waits for it."""
    try:
        mine, problem = work(), None
    except UserError as error:
        mine, problem = [], error
    parts = ranks.gather((mine, problem and str(problem)))
    for _, text in parts:
        if text:
            raise UserError(text) from problem
    return sorted((row for rows, _ in parts for row in rows), key=lambda row: row["index"])


def prompts_per_rank(config: RunConfig) -> int:
    """Of one optimizer step."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps
