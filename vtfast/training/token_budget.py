"""The token budget of a micro-batch. Out of memory halves it, and the same step runs again in smaller micro-batches:
how a step is cut changes memory and speed; the result is the same up to floating-point rounding.

All ranks need the same number of micro-batches, because ZeRO-2 reduces gradients inside each backward pass. So they
agree after each forward pass, where no collective is running. A rank that runs out of memory in a backward pass has
left the others inside a collective: it writes a smaller budget to disk for the next start, and ends the run.

`memory.json` lists each budget with the step from which it held. A run that is resumed at an earlier step cuts the
steps between as they were cut before: another cut adds up in another order, and the run would not be the same to the
bit.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import torch.distributed as dist
from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from vtfast.cost.micro_batches import GroupPart, bin_pack, split_group
from vtfast.distributed.ranks import Ranks
from vtfast.training.groups import MicroBatch
from vtfast.training.load_balancing import StepBatches
from vtfast.utils.errors import RankError, SharedError, UserError
from vtfast.utils.files import write_json
from vtfast.utils.out_of_memory import WHAT_TO_LOWER, catch_out_of_memory, free_memory

log = logging.getLogger("vtfast")
T = TypeVar("T")

OTHER_RANK = "another rank is out of memory"


class MemoryFile(TypedDict):
    """memory.json."""

    token_budget: dict[int, Annotated[int, Field(strict=True, ge=1)]]
    """The budgets that fit the memory, each by the step from which it held."""


class TokenBudget:
    """Maximum number of tokens of a packed micro-batch. A prompt that exceeds it with one completion gets its own."""

    def __init__(
        self,
        tokens: int,
        folder: Path,
        ranks: Ranks,
        timeout: timedelta | None = None,
        free_cache: Callable[[], bool] = lambda: False,
    ) -> None:
        """`tokens`: of the settings; a run that is resumed in `folder` starts with the budget that fit its memory.
        `timeout`: of waiting for other ranks (`--ddp_timeout`). `free_cache`: frees the rollout's memory for good;
        whether there was any."""
        self.file, self.ranks, self.free_cache = folder / "memory.json", ranks, free_cache
        self.tokens = self.limit = tokens
        self.by_first_step: dict[int, int] = ranks.from_main(self._read() if ranks.is_main else {})
        for step, known in self.by_first_step.items():
            if known < tokens:
                log.info("token budget %d from step %d on (%s)", known, step, self.file)
        self._group = None
        if ranks.size > 1 and dist.get_backend() != "gloo":
            # The hosts agree without waiting for their devices.
            self._group = dist.new_group(backend="gloo", timeout=timeout)

    def set_for_step(self, step: int) -> int:
        """Make the budget that of micro-batches which are used up to `step`, and return it."""
        fitting = (tokens for first, tokens in self.by_first_step.items() if first <= step)
        self.tokens = min((self.limit, *fitting))
        return self.tokens

    def _read(self) -> dict[int, int]:
        if not self.file.exists():
            return {}
        try:
            return TypeAdapter(MemoryFile).validate_json(self.file.read_bytes())["token_budget"]
        except ValidationError as error:
            raise UserError(f"{self.file}: cannot be read ({error.errors()[0]['msg']}); remove it") from None

    def fit(
        self,
        batches: StepBatches,
        step: int,
        attempt: Callable[[StepBatches], T],
        undo: Callable[[], None] | None = None,
    ) -> tuple[T, StepBatches]:
        """The result of `attempt`, which runs all micro-batches, and the batches that fit the memory. Collective.

        Each time that `attempt` runs out of memory, all ranks `undo` it and start again: the first time without the
        rollout's cache, then with shorter micro-batches. Raises SharedError when they cannot get shorter."""
        while True:
            with catch_out_of_memory() as caught:
                result = attempt(batches)
            if caught.reason is None:
                return result, batches
            if undo:
                undo()
            freed = self.free_cache()
            free_memory()
            if any(self.ranks.gather(freed)):
                log.warning(
                    "step %d: out of memory (%s); the rollout's cache is freed, now and after every rollout"
                    " (--rollout_keep_cache false), and the same batch runs again",
                    step,
                    caught.reason,
                )
            else:
                batches = self._halve(batches, step, caught.reason)

    @contextlib.contextmanager
    def agree_on_oom(self) -> Iterator[None]:
        """If one rank runs out of memory in this block, all ranks leave it with MemoryError. The block has no
        collectives, and each rank runs it equally often."""
        if self.ranks.size == 1:
            yield
            return
        with catch_out_of_memory() as caught:
            yield
        failed = torch.tensor(caught.reason is not None, dtype=torch.int32)
        dist.all_reduce(failed, dist.ReduceOp.MAX, group=self._group)
        if failed:
            raise MemoryError(caught.reason or OTHER_RANK)

    @contextlib.contextmanager
    def oom_is_fatal(self, micro_batches: Sequence[MicroBatch], step: int, where: str) -> Iterator[None]:
        """For a block with collectives, in which the other ranks cannot start again. Raises RankError if one of several
        ranks runs out of memory. `where`: in the words of the message."""
        if self.ranks.size == 1:
            yield
            return
        with catch_out_of_memory() as caught:
            yield
        if caught.reason is None:
            return
        tokens, before = max(micro_batch.tokens for micro_batch in micro_batches), self.tokens
        self.tokens = self.by_first_step[step] = self._next(tokens, least=max(map(_least, micro_batches)))
        self._write()
        raise RankError(
            f"rank {self.ranks.rank}: out of memory in step {step} ({caught.reason}), in {where}, where the other ranks"
            f" cannot follow; token budget {before}, the next run in this folder starts with {self.tokens}"
            f" ({self.file}); or {WHAT_TO_LOWER}"
        )

    def _halve(self, batches: StepBatches, step: int, reason: str) -> StepBatches:
        """The same batch in micro-batches of half the size. `reason`: of this rank, or OTHER_RANK."""
        sizes = [(micro_batch.tokens, _least(micro_batch)) for micro_batch in batches.micro_batches]
        everyone = self.ranks.gather((sizes, reason))
        largest = max(tokens for sizes, _ in everyone for tokens, _ in sizes)
        least = max(least for sizes, _ in everyone for _, least in sizes)
        reason = "; ".join(
            f"rank {rank}: {text}" if self.ranks.size > 1 else text
            for rank, (_, text) in enumerate(everyone)
            if text != OTHER_RANK
        )
        if largest <= least:
            raise SharedError(
                f"step {step}: out of memory ({reason}) with one completion in a micro-batch, {least} tokens with its"
                f" prompt; {WHAT_TO_LOWER}"
            )
        before = self.tokens
        self.tokens = self.by_first_step[step] = self._next(largest, least)
        if self.ranks.is_main:
            self._write()
        batches = replace(batches, micro_batches=resplit(batches, self.tokens, self.ranks))
        log.warning(
            "step %d: out of memory (%s); token budget %d -> %d, the same batch again in %d micro-batches",
            step,
            reason,
            before,
            self.tokens,
            len(batches.micro_batches),
        )
        return batches

    def _write(self) -> None:
        write_json(self.file, {"token_budget": self.by_first_step})

    def _next(self, largest: int, least: int) -> int:
        """Half of the largest micro-batch, because the budget may be larger than every micro-batch."""
        return max(1, least, min(self.tokens, largest) // 2)


def _least(micro_batch: MicroBatch) -> int:
    """Tokens of the longest prompt with one completion: a micro-batch cannot be shorter."""
    return max((len(group.prompt.ids) + group.lengths[i] for group, i in micro_batch.sequences), default=0)


def resplit(batches: StepBatches, budget: int, ranks: Ranks) -> list[MicroBatch]:
    """The same sequences in micro-batches of at most `budget` tokens, equally many on all ranks. Collective.

    No completion moves to another rank, because its log-probs may have been scored on this one.
    """
    groups, policy = batches.micro_batches[0].groups, batches.micro_batches[0].policy
    parts = []
    for old in (part for micro_batch in batches.micro_batches for part in micro_batch.parts):
        group = groups[old.group]
        lengths = [group.lengths[i] for i in old.members]
        for new in split_group(old.group, len(group.prompt.ids), lengths, old.cost, budget):
            members = tuple(old.members[i] for i in new.members)
            parts.append(GroupPart(new.group, members, new.tokens, new.cost))
    bins = [bin for (bin,) in bin_pack(parts, budget)]
    count = max(ranks.gather(len(bins)))
    bins += [[] for _ in range(count - len(bins))]
    return [MicroBatch(bin, groups, policy) for bin in bins]
