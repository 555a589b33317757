"""One rollout from its first prompt to its last token: who is in flight, where their pages are, when they leave.

    admit     groups get pages while there are enough; their prompts run once, packed, as in training
    decode    every row's newest token goes in, the next one is drawn, `poll` times in a row; on CUDA from a graph
    retire    finished rows give their pages back and leave the batch; waiting groups take their place

Shapes: R rows in flight, G completions a prompt, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from vtfast_kernels.checks import trusted
from vtfast_kernels.linear_sample import linear_sample

from vtfast.data.processor import Processor
from vtfast.data.prompt import Prompt
from vtfast.model.policy import Policy
from vtfast.rollout.cache import GroupPages
from vtfast.rollout.decode_state import Rows
from vtfast.rollout.graphs import bucket
from vtfast.rollout.sampling import Completion, Sampling
from vtfast.rollout.truncated_sampling import warped_sample
from vtfast.rollout.workspace import Workspace

PREFILL_TOKENS = 16384
"""Prompts run packed in rows of at most so many tokens (a longer one alone)."""


@dataclass
class InFlight:
    """A prompt whose rows are in flight."""

    pages: GroupPages
    left: int
    """Rows that are not finished."""


class Scheduler:
    """One call of `RolloutEngine.generate`, over a workspace."""

    def __init__(
        self,
        policy: Policy,
        work: Workspace,
        prompts: Sequence[Prompt],
        group: int,
        sampling: Sampling,
        seed: int,
        *,
        max_rows: int,
        poll: int,
        processor: Processor | None = None,
    ) -> None:
        self.policy, self.processor, self.sampling, self.workspace = policy, processor, sampling, work
        self.max_rows, self.poll = max_rows, 1 if sampling.stop else poll
        self.prompts, self.G = prompts, group
        self.count = count = len(prompts) * group
        work.seed.fill_((seed + 2**63) % 2**64 - 2**63)
        work.limit.fill_(sampling.max_new_tokens)
        work.rows.clear()
        self.waiting = deque(range(len(prompts)))
        self.groups: dict[int, InFlight] = {}
        self.running: list[int] = []
        """Row of the output of each row in flight, on the host."""
        self.lengths = [0] * count
        self.stopped = [False] * count
        self.written = 0
        self.timings = {"prefill": 0.0, "decode": 0.0}
        """Spent so far."""
        self.checked = False
        """Whether the ops have looked at the arguments that these rows make."""
        self.memory: dict | None = {} if work.graphs is None else None
        self.seen: Tensor | None = None  # [rows, V]: for the repetition penalty
        if sampling.repetition_penalty != 1:
            shape = len(work.output.tokens), self.policy.head.shape[0]
            self.seen = torch.zeros(shape, dtype=torch.bool, device=work.device)
            for p, prompt in enumerate(prompts):
                self.seen[p * group : (p + 1) * group, prompt.ids.to(work.device)] = True

    def step(self) -> bool:
        """Some tokens for every live row, new rows among them. False when all are done."""
        if self.running:
            with self.clock("decode"):
                self.decode()
                self.retire()
        admitted = self.schedule()
        if admitted:
            with self.clock("prefill"):
                for part in admitted:
                    self.prefill(part)
                self.retire()
        return bool(self.running or self.waiting)

    @contextlib.contextmanager
    def clock(self, part: str) -> Iterator[None]:
        """Add to `seconds`. `retire`, at the end of each part, has waited for the device anyway."""
        began = time.perf_counter()
        yield
        self.timings[part] += time.perf_counter() - began

    def decode(self) -> None:
        live, graphs = len(self.running), self.workspace.graphs
        plain = graphs is not None and not self.sampling.warped
        rows = self.workspace.rows.slice(0, bucket(live) if plain else live)
        unfinished = self.sampling.max_new_tokens - min(self.lengths[place] for place in self.running)
        with trusted() if self.checked else contextlib.nullcontext():
            for _ in range(min(self.poll, unfinished)):
                if plain:
                    setting = self.sampling.temperature, self.sampling.greedy
                    graphs.run(self.decode_step, rows, setting)
                else:
                    self.decode_step(rows)
        self.checked = True

    def decode_step(self, rows: Rows) -> None:
        """Feed every row's newest token, draw the next one. All on the device."""
        hidden = self.workspace.decoder.step(rows, self.memory)
        rows.length.add_(rows.active)
        self.sample(rows, hidden)

    def sample(self, rows: Rows, hidden: Tensor) -> None:
        """Draw and write down the next token of every row."""
        sampling, work = self.sampling, self.workspace
        chance = {"seed": work.seed, "row_key": rows.key, "position": rows.emitted}
        if sampling.warped:
            place = work.output.place(rows)
            seen = None if self.seen is None else self.seen[place]
            token, logp = warped_sample(hidden, self.policy.head, sampling, eos_ids=work.eos, seen=seen, **chance)
            if self.seen is not None:
                self.seen[place, token] = True
        else:
            token, logp = linear_sample(
                hidden, self.policy.head, temperature=sampling.temperature, greedy=sampling.greedy, **chance
            )
        work.output.commit(rows, token, logp, work.limit, work.eos)

    def schedule(self) -> list[list[int]]:
        """Prompts that have room now, in parts that are prefilled together."""
        admitted: list[int] = []
        live = len(self.running)
        while self.waiting and (live == 0 or live + self.G <= self.max_rows):
            p = self.waiting[0]
            prompt = len(self.prompts[p].ids)
            pages = self.workspace.cache.admit(prompt, self.G, self.sampling.max_new_tokens)
            if pages is None:
                break
            self.groups[p] = InFlight(pages, self.G)
            admitted.append(self.waiting.popleft())
            live += self.G
        parts: list[list[int]] = []
        for p in admitted:
            filled = sum(len(self.prompts[i].ids) for i in parts[-1]) if parts else 0
            if parts and filled + len(self.prompts[p].ids) <= PREFILL_TOKENS:
                parts[-1].append(p)
            else:
                parts.append([p])
        return parts

    def prefill(self, members: Sequence[int]) -> None:
        """Run prompts packed, write their keys and values into their pages, and draw their rows' first tokens."""
        prompts = [self.prompts[p] for p in members]
        work, G = self.workspace, self.G
        cache, page = work.cache, work.cache.page
        lengths = torch.tensor([len(prompt.ids) for prompt in prompts])
        starts = lengths.cumsum(0) - lengths
        source, slots = [], []
        table = torch.zeros(len(members), G, work.rows.table.shape[1], dtype=torch.int32)
        for i, (p, prompt) in enumerate(zip(members, prompts, strict=True)):
            pages = self.groups[p].pages
            tokens, into = cache.prompt_slots(pages, len(prompt.ids))
            source.append(tokens + starts[i])
            slots.append(into)
            for g, own in enumerate(pages.own):
                row = torch.tensor(pages.shared + own, dtype=torch.int32)
                table[i, g, : len(row)] = row
        source, slots = torch.cat(source).to(work.device), torch.cat(slots).to(work.device)

        def store_kv(layer: int, keys: Tensor, values: Tensor) -> None:
            for pool, new in ((cache.keys, keys), (cache.values, values)):
                pool[layer].flatten(0, 1).index_copy_(0, slots, new[source])

        pack = self.policy.pack(prompts, [[]] * len(prompts))
        hidden = self.policy.hidden_states(pack, store_kv)[(starts + lengths - 1).to(work.device)]

        places = [p * G + g for p in members for g in range(G)]
        live = len(self.running)
        rows = work.rows.slice(live, live + len(places))
        rows.write(
            Rows(
                token=torch.zeros(len(places), dtype=torch.int64),
                length=lengths.repeat_interleave(G),
                delta=torch.tensor([p.rope_delta for p in prompts]).repeat_interleave(G),
                table=table.flatten(0, 1),
                group=torch.tensor(members).repeat_interleave(G),
                shared=(lengths // page).repeat_interleave(G),
                key=torch.tensor([row_key(p.key, g) for p in prompts for g in range(G)]),
                emitted=torch.zeros(len(places), dtype=torch.int64),
                place=torch.tensor(places),
                active=torch.ones(len(places), dtype=torch.bool),
            )
        )
        self.running += places
        self.invalidate()
        self.sample(rows, hidden.repeat_interleave(G, dim=0))

    def retire(self) -> None:
        """Finished rows leave the batch, their pages return to the pool. The host looks here alone."""
        rows = self.workspace.rows.slice(0, len(self.running))
        emitted, active = torch.stack([rows.emitted, rows.active.long()]).tolist()
        for place, n in zip(self.running, emitted, strict=True):
            self.written += n - self.lengths[place]
            self.lengths[place] = n
        if self.sampling.stop:
            for row, stopped in enumerate(self.end_with_a_stop()):
                if stopped:
                    self.stopped[self.running[row]], active[row] = True, 0
        live = [row for row, is_live in enumerate(active) if is_live]
        if len(live) == len(active):
            return
        for row, place in enumerate(self.running):
            if not active[row]:
                self.release_row(place)
        rows.keep(torch.tensor(live, dtype=torch.int64, device=self.workspace.device))
        self.running = [self.running[row] for row in live]
        self.invalidate()

    def release_row(self, place: int) -> None:
        p, g = divmod(place, self.G)
        group = self.groups[p]
        group.left -= 1
        self.workspace.cache.release(group.pages.own[g])
        group.pages.own[g] = []
        if group.left == 0:
            self.workspace.cache.release(group.pages.shared)
            del self.groups[p]

    def invalidate(self) -> None:
        """The rows are others now: what attention remembers of the old ones is void, and the first step is checked."""
        self.checked = False
        if self.memory is not None:
            self.memory = {}

    def end_with_a_stop(self) -> list[bool]:
        """For each row in flight. The text of the row so far is searched, on the host."""
        places = torch.tensor(self.running, device=self.workspace.device)
        longest = max(self.lengths[place] for place in self.running)
        texts = self.workspace.output.tokens[places, :longest].tolist()
        found = []
        for place, tokens in zip(self.running, texts, strict=True):
            text = self.processor.decode(tokens[: self.lengths[place]])
            found.append(any(stop in text for stop in self.sampling.stop))
        return found

    def release(self) -> None:
        """Every page that is still held: nothing after a whole run, everything after a failure."""
        if self.groups:
            self.workspace.cache.clear()  # nobody has looked at what was written
        for group in self.groups.values():
            self.workspace.cache.release(group.pages.all)
        self.groups = {}

    def collect(self) -> list[list[Completion]]:
        output, eos = self.workspace.output, set(self.policy.eos_ids)
        written = slice(self.count), slice(max(self.lengths))
        tokens, logps = output.tokens[written].tolist(), output.logps[written].tolist()
        completions = []
        for place, n in enumerate(self.lengths):
            stopped = self.stopped[place] or tokens[place][n - 1] in eos
            reason = "stop" if stopped else "length"
            completions.append(Completion(tokens[place][:n], logps[place][:n], reason))
        if not all(math.isfinite(x) for completion in completions for x in completion.logprobs):
            self.workspace.cache.clear()  # masked attention multiplies stale numbers by zero, and zero times NaN is NaN
        return [completions[i : i + self.G] for i in range(0, self.count, self.G)]


def row_key(prompt_key: int, sample: int) -> int:
    """Key of one row's randomness. Odd-constant mixing keeps neighbouring samples of a prompt unrelated."""
    mixed = (prompt_key + (sample + 1) * 0x9E3779B97F4A7C15) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    return (mixed ^ (mixed >> 31)) >> 1
