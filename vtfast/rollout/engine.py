"""Batched sampling with the trainer's own weights: packed prefill, shared prompt pages, a decode step for all rows.

    admit     groups get pages while there are enough; their prompts run once, packed, as in training
    sample    one token a row, with its log-prob, from the hidden states at hand
    decode    the tokens go in, the next hidden states come out
    retire    finished rows give their pages back and leave the batch; waiting groups take their place

A row's tokens depend on (seed, prompt, sample number) and on nothing else: the sampler's randomness is a function of
(seed, row key, position), and a row key is made of the prompt's content and the sample number.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from vtfast_kernels.linear_sample import linear_sample

from vtfast.errors import UserError
from vtfast.model import Policy
from vtfast.processor import Processor, Prompt
from vtfast.rollout.cache import GroupPages, PagedCache
from vtfast.rollout.decode import Decoder, Rows
from vtfast.rollout.sampling import Completion, Sampling
from vtfast.rollout.warp import warped_sample

PAGE = {"cpu": 16, "cuda": 256}
"""Tokens of a cache page."""
CACHE_SHARE = {"cpu": 0.25, "cuda": 0.6}
"""Most of the free memory that the cache may take."""
PREFILL_TOKENS = 16384
"""Prompts run packed in rows of at most so many tokens (a longer one alone)."""
MAX_ROWS = 512
"""Rows in flight."""
DEFAULT = Sampling()
BAR_DELAY = 5.0
"""Seconds before a rollout shows its progress bar."""


class RolloutEngine:
    """Generates from `policy.module` as it is at each call: edit a weight, and the next call sees it."""

    def __init__(
        self,
        policy: Policy,
        processor: Processor | None = None,
        *,
        cache_tokens: int | None = None,
        max_rows: int = MAX_ROWS,
    ) -> None:
        """`processor`: for stop texts. `cache_tokens`: size of the key-value cache; None: what the prompts of a call
        need, up to a share of the free memory. Raises UserError for a model with sliding windows."""
        if set(policy.language_model.config.layer_types) != {"full_attention"}:
            raise UserError("the rollout does not support sliding-window attention")
        self.policy, self.processor = policy, processor
        self.cache_tokens, self.max_rows = cache_tokens, max_rows
        self.cache: PagedCache | None = None

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        num_generations: int = 1,
        sampling: Sampling = DEFAULT,
        seed: int = 0,
        progress: bool = False,
    ) -> list[list[Completion]]:
        """`num_generations` completions of each prompt: result[p][g].

        `progress`: a bar with tokens/s and rows alive, once the rollout takes a few seconds. Raises UserError for a
        prompt that does not fit into the cache.
        """
        if not prompts:
            return []
        if num_generations < 1:
            raise UserError(f"num_generations {num_generations}: must be at least 1")
        if sampling.stop and self.processor is None:
            raise UserError("stop: RolloutEngine needs a processor to find texts in tokens")
        run = _Run(self, prompts, num_generations, sampling, seed)
        bar = tqdm(total=run.count * sampling.max_new_tokens, desc="rollout", unit="token",
                   delay=BAR_DELAY, leave=False, disable=not progress)  # fmt: skip
        try:
            while run.advance():
                bar.set_postfix_str(f"{run.alive} rows alive", refresh=False)
                bar.update(run.alive)
        finally:
            bar.close()
            run.release()
        return run.collect()

    def room(self, prompts: Sequence[Prompt], group: int, new: int) -> PagedCache:
        """The cache, made anew when it is too small for these prompts or has lost its device."""
        policy = self.policy
        config, kind = policy.language_model.config, policy.device.type
        page = PAGE[kind]
        heads = config.num_key_value_heads
        head_dim = config.hidden_size // config.num_attention_heads
        shared = [divmod(len(prompt.ids), page) for prompt in prompts]
        wanted = sum(full + group * -(-(rest + new) // page) for full, rest in shared)
        if self.cache_tokens is not None:
            pages = -(-self.cache_tokens // page)
        else:
            token = 2 * config.num_hidden_layers * heads * head_dim * policy.head.element_size()
            room = int(CACHE_SHARE[kind] * _free_memory(policy.device)) // (token * page)
            pages = min(wanted, max(room, 1))
        fits = self.cache is not None and self.cache.keys.device == policy.device
        if not fits or self.cache.keys.dtype != policy.head.dtype or self.cache.pages < pages:
            self.cache = None  # the old one's memory first
            self.cache = PagedCache(
                config.num_hidden_layers,
                pages,
                page,
                heads,
                head_dim,
                policy.head.dtype,
                policy.device,
            )
        return self.cache


@dataclass
class _Group:
    """A prompt whose rows are in flight."""

    pages: GroupPages
    left: int
    """Rows that are not finished."""


class _Run:
    """One call of `generate`."""

    def __init__(
        self,
        engine: RolloutEngine,
        prompts: Sequence[Prompt],
        group: int,
        sampling: Sampling,
        seed: int,
    ) -> None:
        self.engine, self.policy, self.sampling, self.seed = engine, engine.policy, sampling, seed
        self.prompts, self.G = prompts, group
        self.count = count = len(prompts) * group
        self.cache = engine.room(prompts, group, sampling.max_new_tokens)
        longest = max(len(prompt.ids) for prompt in prompts) + sampling.max_new_tokens
        self.decoder = Decoder(self.policy, self.cache, longest)
        self.pages_a_row = -(-longest // self.cache.page) + 1
        device = self.policy.device
        self.eos = torch.tensor(self.policy.eos_ids, dtype=torch.int64, device=device)
        self.waiting = deque(range(len(prompts)))
        self.groups: dict[int, _Group] = {}
        self.rows: Rows | None = None
        self.alive = 0
        self.tokens = torch.zeros(count, sampling.max_new_tokens, dtype=torch.int64, device=device)
        self.logps = torch.zeros(count, sampling.max_new_tokens, device=device)
        self.lengths = torch.zeros(count, dtype=torch.int64, device=device)
        self.stopped = torch.zeros(count, dtype=torch.bool, device=device)
        self.seen: Tensor | None = None  # [rows, V]: for the repetition penalty
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(
                count, self.policy.head.shape[0], dtype=torch.bool, device=device
            )
            for p, prompt in enumerate(prompts):
                self.seen[p * group : (p + 1) * group, prompt.ids.to(device)] = True

    def advance(self) -> bool:
        """One token for every live row, new ones among them. False when all are done."""
        if self.rows is not None:
            hidden = self.decoder.step(self.rows)
            self.rows.length += 1
            self.sample(self.rows, hidden)
            self.retire()
        for rows, hidden in self.admit():
            self.sample(rows, hidden)
            self.rows = rows if self.rows is None else Rows.join(self.rows, rows)
            self.retire()
        return self.rows is not None

    def admit(self) -> list[tuple[Rows, Tensor]]:
        """Waiting groups that have room now -> their rows, and the hidden states that predict the first tokens."""
        admitted: list[int] = []
        live = 0 if self.rows is None else len(self.rows.token)
        while self.waiting and (live == 0 or live + self.G <= self.engine.max_rows):
            p = self.waiting[0]
            prompt = len(self.prompts[p].ids)
            pages = self.cache.admit(prompt, self.G, self.sampling.max_new_tokens)
            if pages is None:
                break
            self.groups[p] = _Group(pages, self.G)
            admitted.append(self.waiting.popleft())
            live += self.G
        parts: list[list[int]] = []
        for p in admitted:
            filled = sum(len(self.prompts[i].ids) for i in parts[-1]) if parts else 0
            if parts and filled + len(self.prompts[p].ids) <= PREFILL_TOKENS:
                parts[-1].append(p)
            else:
                parts.append([p])
        return [self.prefill(part) for part in parts]

    def prefill(self, members: Sequence[int]) -> tuple[Rows, Tensor]:
        """Run prompts packed, write their keys and values into their pages."""
        prompts = [self.prompts[p] for p in members]
        device, page, G = self.policy.device, self.cache.page, self.G
        lengths = torch.tensor([len(prompt.ids) for prompt in prompts])
        starts = lengths.cumsum(0) - lengths
        source, slots = [], []
        table = torch.zeros(len(members), G, self.pages_a_row, dtype=torch.int32)
        for i, (p, prompt) in enumerate(zip(members, prompts, strict=True)):
            pages = self.groups[p].pages
            tokens, into = self.cache.prompt_slots(pages, len(prompt.ids))
            source.append(tokens + starts[i])
            slots.append(into)
            for g, own in enumerate(pages.own):
                row = torch.tensor(pages.shared + own, dtype=torch.int32)
                table[i, g, : len(row)] = row
        source, slots = torch.cat(source).to(device), torch.cat(slots).to(device)

        def store(layer: int, keys: Tensor, values: Tensor) -> None:
            for pool, new in ((self.cache.keys, keys), (self.cache.values, values)):
                pool[layer].flatten(0, 1).index_copy_(0, slots, new[source])

        pack = self.policy.pack(prompts, [[]] * len(prompts))
        hidden = self.policy.trunk(pack, store)[(starts + lengths - 1).to(device)]

        def each(values: list[int] | Tensor) -> Tensor:
            """One number a prompt -> one a row."""
            return torch.as_tensor(values).repeat_interleave(G).to(device)

        numbers = torch.tensor(members)
        keys = [row_key(prompt.key, g) for prompt in prompts for g in range(G)]
        rows = Rows(
            token=torch.zeros(len(members) * G, dtype=torch.int64, device=device),
            length=each(lengths),
            delta=each([prompt.rope_delta for prompt in prompts]),
            table=table.flatten(0, 1).to(device),
            group=each(numbers),
            shared=each(lengths // page),
            key=torch.tensor(keys, device=device),
            emitted=torch.zeros(len(members) * G, dtype=torch.int64, device=device),
            index=each(numbers * G) + torch.arange(G, device=device).repeat(len(members)),
            active=torch.ones(len(members) * G, dtype=torch.bool, device=device),
        )
        return rows, hidden.repeat_interleave(G, dim=0)

    def sample(self, rows: Rows, hidden: Tensor) -> None:
        """Draw and write the next token of every row."""
        sampling = self.sampling
        chance = {"seed": self.seed, "row_key": rows.key, "position": rows.emitted}
        if sampling.warped:
            seen = None if self.seen is None else self.seen[rows.index]
            token, logp = warped_sample(
                hidden, self.policy.head, sampling, eos_ids=self.eos, seen=seen, **chance
            )
        else:
            token, logp = linear_sample(
                hidden,
                self.policy.head,
                temperature=sampling.temperature,
                greedy=sampling.greedy,
                **chance,
            )
        rows.token = token
        self.tokens[rows.index, rows.emitted] = token
        self.logps[rows.index, rows.emitted] = logp
        if self.seen is not None:
            self.seen[rows.index, token] = True
        rows.emitted = rows.emitted + 1
        self.lengths[rows.index] = rows.emitted
        stopped = torch.isin(token, self.eos)
        if sampling.stop:
            stopped = stopped | self.ends_with_a_stop(rows)
        self.stopped[rows.index] = stopped
        rows.active = ~stopped & (rows.emitted < sampling.max_new_tokens)

    def ends_with_a_stop(self, rows: Rows) -> Tensor:
        """[R] bool, on the host: the text of every row so far is searched."""
        found = []
        for index, n in zip(rows.index.tolist(), rows.emitted.tolist(), strict=True):
            text = self.engine.processor.decode(self.tokens[index, :n].tolist())
            found.append(any(stop in text for stop in self.sampling.stop))
        return torch.tensor(found, device=rows.token.device)

    def retire(self) -> None:
        """Finished rows leave the batch, their pages return to the pool."""
        active = self.rows.active
        self.alive = int(active.sum())
        if self.alive == len(active):
            return
        for index in self.rows.index[~active].tolist():
            p, g = divmod(index, self.G)
            group = self.groups[p]
            group.left -= 1
            self.cache.release(group.pages.own[g])
            group.pages.own[g] = []
            if group.left == 0:
                self.cache.release(group.pages.shared)
                del self.groups[p]
        self.rows = self.rows.take(active.nonzero().squeeze(1)) if self.alive else None

    def release(self) -> None:
        """Every page that is still held: nothing after a whole run, everything after a failure."""
        for group in self.groups.values():
            self.cache.release(group.pages.all)
        self.groups = {}

    def collect(self) -> list[list[Completion]]:
        lengths, stopped = self.lengths.tolist(), self.stopped.tolist()
        tokens, logps = self.tokens.tolist(), self.logps.tolist()
        rows = [
            Completion(tokens[r][:n], logps[r][:n], "stop" if stopped[r] else "length")
            for r, n in enumerate(lengths)
        ]
        return [rows[i : i + self.G] for i in range(0, len(rows), self.G)]


def _free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def row_key(prompt_key: int, sample: int) -> int:
    """Key of one row's randomness. Odd-constant mixing keeps neighbouring samples of a prompt unrelated."""
    mixed = (prompt_key + (sample + 1) * 0x9E3779B97F4A7C15) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    return (mixed ^ (mixed >> 31)) >> 1
