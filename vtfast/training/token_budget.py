"""The token budget of a pass, and what happens when the memory does not do for it: it is halved, and the same batch is
cut again. How a batch is cut changes memory and speed, never the result.

Ranks need an equal number of passes, since ZeRO-2 reduces gradients inside each backward pass. So they agree behind
each forward pass, where no collective is under way. A rank that fails in a backward pass has left the others inside
one: it writes the next budget down for the run that goes on, and ends this one.

`memory.json` says from which step on a budget holds. A run that goes on from an earlier one cuts the steps between as
they were cut, since another cut adds up in another order: only so it is the same run to the bit.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from vtfast.cost.micro_batches import GroupPart, bin_pack, split_group
from vtfast.distributed.ranks import Ranks
from vtfast.training.groups import Group, MicroBatch
from vtfast.training.load_balancing import StepBatches
from vtfast.utils.errors import RankError, SharedError, UserError
from vtfast.utils.files import write_json
from vtfast.utils.out_of_memory import free_memory, is_out_of_memory
from vtfast.utils.text import first_line

log = logging.getLogger("vtfast")
T = TypeVar("T")

WHAT_TO_LOWER = (
    "lower --max_completion_length, --max_prompt_length or --max_pixels, free the rollout's cache with"
    " --rollout_keep_cache false, or trade time for memory with --gradient_checkpointing true"
)


class Elsewhere(MemoryError):
    """Another rank is out of memory."""


class TokenBudget:
    """Most tokens of a packed pass (a longer prompt with one completion goes alone)."""

    def __init__(self, tokens: int, folder: Path, ranks: Ranks, timeout: timedelta | None = None) -> None:
        """`tokens`: what the settings say. A run that goes on in `folder` knows what its memory did for.
        `timeout`: of waiting for other ranks (`--ddp_timeout`)."""
        self.file, self.ranks = folder / "memory.json", ranks
        self.tokens = self.most = tokens
        self.known: dict[int, int] = ranks.from_main(self._read() if ranks.is_main else {})
        """What the memory did for, by the step from which on."""
        for step, known in self.known.items():
            if known < tokens:
                log.info("token budget %d from step %d on, by %s", known, step, self.file)
        self._group = None
        if ranks.size > 1 and dist.get_backend() != "gloo":
            # An agreement of hosts does not wait for the devices.
            self._group = dist.new_group(backend="gloo", timeout=timeout)

    def at(self, step: int) -> int:
        """The budget of a batch whose last use is `step`."""
        known = (tokens for since, tokens in self.known.items() if since <= step)
        self.tokens = min((self.most, *known))
        return self.tokens

    def _read(self) -> dict[int, int]:
        try:
            known = json.loads(self.file.read_text())["token_budget"]
            known = {int(step): tokens for step, tokens in known.items()}
        except FileNotFoundError:
            return {}
        except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
            raise UserError(f"{self.file}: cannot be read ({error}); remove it") from None
        for tokens in known.values():
            if type(tokens) is not int or tokens < 1:
                raise UserError(f"{self.file}: token_budget {tokens!r} is no number of tokens; remove the file")
        return known

    def _lower(self, tokens: int, step: int) -> None:
        """From `step` on."""
        self.tokens = self.known[step] = tokens

    def _write(self) -> None:
        write_json(self.file, {"token_budget": self.known})

    def fit(
        self, work: StepBatches, attempt: Callable[[], T], undo: Callable[[], None] | None = None, step: int = 0
    ) -> T:
        """The result of `attempt`, which runs the passes of `work`. Each time that it runs out of memory, all ranks
        `undo` what it left, and `work` is cut again, in place. Collective. Raises UserError when it cannot be cut
        any shorter."""
        while True:
            try:
                return attempt()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = None if isinstance(error, Elsewhere) else first_line(error)
            if undo:
                undo()
            free_memory()
            self._halve(work, step, reason)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """All ranks run out of memory in here, or none. The block has no collectives, and each rank comes to it."""
        if self.ranks.size == 1:
            yield
            return
        reason = None
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = first_line(error)
        failed = torch.tensor(reason is not None, dtype=torch.int32)
        dist.all_reduce(failed, dist.ReduceOp.MAX, group=self._group)
        if reason is not None:
            raise MemoryError(reason)
        if failed:
            raise Elsewhere

    @contextlib.contextmanager
    def alone(self, batch: MicroBatch, step: int = 0) -> Iterator[None]:
        """For a block with collectives in it. Raises RankError where one of several ranks runs out of memory."""
        try:
            yield
        except Exception as error:
            if self.ranks.size == 1 or not is_out_of_memory(error):
                raise
            tokens, before = _tokens(batch), self.tokens
            self._lower(self._next(tokens, least=_least(batch)), step)
            self._write()
            raise RankError(
                f"rank {self.ranks.rank}: out of memory in step {step}, in the backward pass of {tokens} tokens, where"
                f" the other ranks cannot follow; token budget {before}, the next run in this folder starts with"
                f" {self.tokens} ({self.file})"
            ) from error

    def _halve(self, work: StepBatches, step: int, reason: str | None) -> None:
        """`reason`: this rank's own, if it has one."""
        sizes = [(_tokens(batch), _least(batch)) for batch in work.batches]
        everyone = self.ranks.gather((sizes, reason))
        largest = max(tokens for sizes, _ in everyone for tokens, _ in sizes)
        least = max(least for sizes, _ in everyone for _, least in sizes)
        reason = "; ".join(
            f"rank {rank}: {text}" if self.ranks.size > 1 else text
            for rank, (_, text) in enumerate(everyone)
            if text is not None
        )
        if largest <= least:
            raise SharedError(
                f"step {step}: out of memory ({reason}) with one completion a pass, {least} tokens with its prompt;"
                f" {WHAT_TO_LOWER}"
            )
        before = self.tokens
        self._lower(self._next(largest, least), step)
        if self.ranks.is_main:
            self._write()
        work.batches[:] = cut_again(work, self.tokens, self.ranks)
        log.warning(
            "step %d: out of memory (%s); token budget %d -> %d, the same batch again in %d passes",
            step,
            reason,
            before,
            self.tokens,
            len(work.batches),
        )

    def _next(self, largest: int, least: int) -> int:
        """Half of what the largest pass had: half of a budget that no pass fills would change nothing."""
        return max(1, least, min(self.tokens, largest) // 2)


def _tokens(batch: MicroBatch) -> int:
    return sum(part.tokens for part in batch.parts)


def _least(batch: MicroBatch) -> int:
    """Tokens of the longest prompt with one completion: a pass cannot be shorter than that."""
    return max((_prompt(group) + group.lengths[i] for group, i in batch.sequences), default=0)


def _prompt(group: Group) -> int:
    return len(group.question.prompt.ids)


def cut_again(work: StepBatches, budget: int, ranks: Ranks) -> list[MicroBatch]:
    """The batches of `work` in passes of at most `budget` tokens, equally many on all ranks. Collective.

    No completion changes its rank, since log-probs that were scored for it are there.
    """
    groups, policy = work.batches[0].groups, work.batches[0].policy
    parts = []
    for old in (part for batch in work.batches for part in batch.parts):
        group = groups[old.group]
        lengths = [group.lengths[i] for i in old.members]
        for new in split_group(old.group, _prompt(group), lengths, old.cost, budget):
            members = tuple(old.members[i] for i in new.members)
            parts.append(GroupPart(new.group, members, new.tokens, new.cost))
    bins = [bin for (bin,) in bin_pack(parts, budget)]
    passes = max(ranks.gather(len(bins)))
    bins += [[] for _ in range(passes - len(bins))]
    return [MicroBatch(bin, groups, policy) for bin in bins]
