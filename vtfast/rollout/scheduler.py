"""One rollout from its first prompt to its last token: which rows run, where their pages are, when they leave.

    schedule  waiting groups get pages while there are enough; their prompts run once, packed, as in training
    decode    feed each row's newest token and sample the next, `steps_per_sync` times; on CUDA from a graph
    finish    finished rows return their pages and leave the batch; waiting groups take their place

Shapes: R running rows, G completions per prompt, D hidden size, V vocabulary.
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
from vtfast_kernels.checks import skip_checks
from vtfast_kernels.linear_sample import linear_sample
from vtfast_kernels.page_table import PrefixCache

from vtfast.data.processor import Processor
from vtfast.data.prompt import Prompt
from vtfast.model.policy import Policy
from vtfast.rollout.graphs import bucket
from vtfast.rollout.kv_cache import GroupPages
from vtfast.rollout.logits_processors import sample_with_processors
from vtfast.rollout.row_state import RowState
from vtfast.rollout.sampling_params import Completion, Sampling, row_key
from vtfast.rollout.workspace import Workspace

PREFILL_TOKENS = 16384
"""Prompts are prefilled in packed rows of at most so many tokens (a longer one alone)."""


@dataclass
class RunningGroup:
    """A prompt whose rows are running."""

    pages: GroupPages
    unfinished: int
    """Rows that are not finished."""


class Scheduler:
    """One call of `RolloutEngine.generate`, over a workspace."""

    def __init__(
        self,
        policy: Policy,
        workspace: Workspace,
        prompts: Sequence[Prompt],
        num_generations: int,
        sampling: Sampling,
        seed: int,
        *,
        max_rows: int,
        steps_per_sync: int,
        processor: Processor | None = None,
    ) -> None:
        self.policy, self.processor, self.sampling, self.workspace = policy, processor, sampling, workspace
        self.max_rows, self.steps_per_sync = max_rows, 1 if sampling.stop else steps_per_sync
        self.prompts, self.G = prompts, num_generations
        self.count = len(prompts) * num_generations
        workspace.seed.fill_((seed + 2**63) % 2**64 - 2**63)
        workspace.limit.fill_(sampling.max_new_tokens)
        workspace.rows.clear()
        self.waiting = deque(range(len(prompts)))
        """Prompts that are not admitted yet."""
        self.groups: dict[int, RunningGroup] = {}
        """Running groups by prompt number."""
        self.running: list[int] = []
        """Output row of each running row, on the host."""
        self.lengths = [0] * self.count
        self.stopped = [False] * self.count
        self.num_tokens = 0
        """Tokens generated so far, as of the last `finish_rows`."""
        self.timings = {"prefill": 0.0, "decode": 0.0}
        """Seconds spent in each phase so far."""
        self.inputs_validated = False
        """Whether the kernels have validated their arguments since the rows changed."""
        self.prefix_cache: PrefixCache | None = {} if workspace.graphs is None else None
        self.seen_tokens: Tensor | None = None  # [output rows, V] bool, for the repetition penalty
        if sampling.repetition_penalty != 1:
            self.seen_tokens = self._tokens_of_prompts()

    def _tokens_of_prompts(self) -> Tensor:
        shape = len(self.workspace.output.tokens), self.policy.head.shape[0]
        seen = torch.zeros(shape, dtype=torch.bool, device=self.workspace.device)
        for p, prompt in enumerate(self.prompts):
            seen[p * self.G : (p + 1) * self.G, prompt.ids.to(self.workspace.device)] = True
        return seen

    def step(self) -> bool:
        """Decode some tokens for every running row, then admit new rows. Return False when all are done."""
        if self.running:
            with self.timer("decode"):
                self.decode()
                self.finish_rows()
        parts = self.schedule()
        if parts:
            with self.timer("prefill"):
                for part in parts:
                    self.prefill(part)
                self.finish_rows()
        return bool(self.running or self.waiting)

    @contextlib.contextmanager
    def timer(self, phase: str) -> Iterator[None]:
        """Add to `timings`. `finish_rows`, at the end of each phase, has waited for the device anyway."""
        start = time.perf_counter()
        yield
        self.timings[phase] += time.perf_counter() - start

    def schedule(self) -> list[list[int]]:
        """Admit the prompts that have room now. Return them in parts that are prefilled together."""
        admitted: list[int] = []
        running = len(self.running)
        while self.waiting and (running == 0 or running + self.G <= self.max_rows):
            p = self.waiting[0]
            pages = self.workspace.cache.allocate(len(self.prompts[p].ids), self.G, self.sampling.max_new_tokens)
            if pages is None:
                break
            self.groups[p] = RunningGroup(pages, self.G)
            admitted.append(self.waiting.popleft())
            running += self.G
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
        device, cache, G = self.workspace.device, self.workspace.cache, self.G
        lengths = torch.tensor([len(prompt.ids) for prompt in prompts])
        starts = lengths.cumsum(0) - lengths
        sources, targets = [], []
        for p, prompt, start in zip(members, prompts, starts, strict=True):
            tokens, into = cache.prompt_slots(self.groups[p].pages, len(prompt.ids))
            sources.append(tokens + start)
            targets.append(into)
        source, slots = torch.cat(sources).to(device), torch.cat(targets).to(device)

        def kv_callback(layer: int, keys: Tensor, values: Tensor) -> None:
            for pool, new in ((cache.keys, keys), (cache.values, values)):
                pool[layer].flatten(0, 1).index_copy_(0, slots, new[source])

        pack = self.policy.pack(prompts, [[]] * len(prompts))
        hidden = self.policy.hidden_states(pack, kv_callback)[(starts + lengths - 1).to(device)]

        output_rows = [p * G + g for p in members for g in range(G)]
        running = len(self.running)
        rows = self.workspace.rows.slice(running, running + len(output_rows))
        rows.copy_from(
            RowState(
                token=torch.zeros(len(output_rows), dtype=torch.int64),
                length=lengths.repeat_interleave(G),
                rope_delta=torch.tensor([p.rope_delta for p in prompts]).repeat_interleave(G),
                block_table=self._block_table(members),
                group=torch.tensor(members).repeat_interleave(G),
                num_shared_pages=(lengths // cache.page_size).repeat_interleave(G),
                row_key=torch.tensor([row_key(p.key, g) for p in prompts for g in range(G)]),
                num_generated=torch.zeros(len(output_rows), dtype=torch.int64),
                output_row=torch.tensor(output_rows),
                active=torch.ones(len(output_rows), dtype=torch.bool),
            )
        )
        self.running += output_rows
        self.invalidate()
        self.sample(rows, hidden.repeat_interleave(G, dim=0))

    def _block_table(self, members: Sequence[int]) -> Tensor:
        """[rows of the prompts `members`, pages per row] int32, on the host."""
        rows = [self.groups[p].pages.shared + own for p in members for own in self.groups[p].pages.own]
        table = torch.zeros(len(rows), self.workspace.rows.block_table.shape[1], dtype=torch.int32)
        for row, pages in zip(table, rows, strict=True):
            row[: len(pages)] = torch.tensor(pages, dtype=torch.int32)
        return table

    def decode(self) -> None:
        running, graphs = len(self.running), None if self.sampling.warped else self.workspace.graphs
        rows = self.workspace.rows.slice(0, running if graphs is None else bucket(running))
        most_left = self.sampling.max_new_tokens - min(self.lengths[row] for row in self.running)
        with skip_checks() if self.inputs_validated else contextlib.nullcontext():
            for _ in range(min(self.steps_per_sync, most_left)):
                if graphs is None:
                    self.decode_step(rows)
                else:
                    graphs.run(self.decode_step, rows, (self.sampling.temperature, self.sampling.greedy))
        self.inputs_validated = True

    def decode_step(self, rows: RowState) -> None:
        """Feed each row's newest token and sample the next one, all on the device."""
        hidden = self.workspace.decoder.step(rows, self.prefix_cache)
        rows.length.add_(rows.active)
        self.sample(rows, hidden)

    def sample(self, rows: RowState, hidden: Tensor) -> None:
        """Draw and write the next token of every row."""
        sampling, workspace, head = self.sampling, self.workspace, self.policy.head
        if sampling.warped:
            output_row = workspace.output.writable_row(rows)
            token, logp = sample_with_processors(
                hidden,
                head,
                sampling,
                seed=workspace.seed,
                row_key=rows.row_key,
                position=rows.num_generated,
                eos_ids=workspace.eos,
                seen=None if self.seen_tokens is None else self.seen_tokens[output_row],
            )
            if self.seen_tokens is not None:
                self.seen_tokens[output_row, token] = True
        else:
            token, logp = linear_sample(
                hidden,
                head,
                temperature=sampling.temperature,
                greedy=sampling.greedy,
                seed=workspace.seed,
                row_key=rows.row_key,
                position=rows.num_generated,
            )
        workspace.output.append(rows, token, logp, workspace.limit, workspace.eos)

    def finish_rows(self) -> None:
        """Take finished rows out of the batch and return their pages. The only place that reads the device."""
        rows = self.workspace.rows.slice(0, len(self.running))
        num_generated, active = torch.stack([rows.num_generated, rows.active.long()]).tolist()
        for output_row, n in zip(self.running, num_generated, strict=True):
            self.num_tokens += n - self.lengths[output_row]
            self.lengths[output_row] = n
        if self.sampling.stop:
            for row, stopped in enumerate(self.find_stop_strings()):
                if stopped:
                    self.stopped[self.running[row]], active[row] = True, 0
        running = [row for row, is_active in enumerate(active) if is_active]
        if len(running) == len(active):
            return
        for row, output_row in enumerate(self.running):
            if not active[row]:
                self.release_row(output_row)
        rows.compact(torch.tensor(running, dtype=torch.int64, device=self.workspace.device))
        self.running = [self.running[row] for row in running]
        self.invalidate()

    def release_row(self, output_row: int) -> None:
        """Return the row's own pages, and with the last row of a group the shared ones."""
        p, g = divmod(output_row, self.G)
        group = self.groups[p]
        group.unfinished -= 1
        self.workspace.cache.release(group.pages.own[g])
        group.pages.own[g] = []
        if group.unfinished == 0:
            self.workspace.cache.release(group.pages.shared)
            del self.groups[p]

    def invalidate(self) -> None:
        """The rows changed: drop attention's gathered prefixes, and validate kernel arguments at the next step."""
        self.inputs_validated = False
        if self.prefix_cache is not None:
            self.prefix_cache = {}

    def find_stop_strings(self) -> list[bool]:
        """Return for each running row whether its text holds a stop string. Searched on the host."""
        assert self.processor is not None, "RolloutEngine.start refuses stop strings without a processor"
        output_rows = torch.tensor(self.running, device=self.workspace.device)
        longest = max(self.lengths[row] for row in self.running)
        tokens = self.workspace.output.tokens[output_rows, :longest].tolist()
        texts = [self.processor.decode(t[: self.lengths[row]]) for row, t in zip(self.running, tokens, strict=True)]
        return [any(stop in text for stop in self.sampling.stop) for text in texts]

    def release(self) -> None:
        """After a failed call, release the pages still allocated. After a finished one, none are."""
        if self.groups:
            self.workspace.cache.clear()  # what was written may hold NaN
        for group in self.groups.values():
            self.workspace.cache.release(group.pages.all)
        self.groups = {}

    def collect(self) -> list[list[Completion]]:
        """Return the completions of each prompt."""
        output, eos = self.workspace.output, set(self.policy.eos_ids)
        written = slice(self.count), slice(max(self.lengths))
        tokens, logps = output.tokens[written].tolist(), output.logps[written].tolist()
        completions = []
        for row, n in enumerate(self.lengths):
            stopped = self.stopped[row] or tokens[row][n - 1] in eos
            completions.append(Completion(tokens[row][:n], logps[row][:n], "stop" if stopped else "length"))
        if not all(math.isfinite(x) for completion in completions for x in completion.logprobs):
            self.workspace.cache.clear()  # masked attention multiplies stale numbers by zero, and zero times NaN is NaN
        return [completions[i : i + self.G] for i in range(0, self.count, self.G)]
