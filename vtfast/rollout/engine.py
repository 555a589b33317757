"""Batched sampling with the trainer's own weights: packed prefill, shared prompt pages, a decode step for all rows.

`Scheduler` holds the loop, `Workspace` the memory that it works on, `Decoder` the model's layers.

A row's tokens depend on (seed, prompt, sample number) and on nothing else: the sampler's randomness is a function of
(seed, row key, position), and a row key is made of the prompt's content and the sample number.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from tqdm import tqdm

from vtfast.data.processor import Processor
from vtfast.data.prompt import Prompt
from vtfast.distributed import watchdog
from vtfast.distributed.determinism import require_full_size
from vtfast.model.policy import Policy, layer_types
from vtfast.rollout.attention import decode_attention
from vtfast.rollout.cache import pages_needed
from vtfast.rollout.graphs import Capture, bucket
from vtfast.rollout.sampling import Completion, Sampling
from vtfast.rollout.scheduler import Scheduler
from vtfast.rollout.workspace import Size, Workspace, addresses, cache_shape
from vtfast.utils.errors import RankError, UserError
from vtfast.utils.out_of_memory import free_memory, is_out_of_memory
from vtfast.utils.text import first_line

log = logging.getLogger("vtfast")

PAGE_SIZE = {"cpu": 16, "cuda": 256}
"""Tokens of a cache page."""
CACHE_SHARE = {"cpu": 0.25, "cuda": 0.6}
"""Most of the free memory that the cache may take."""
MAX_ROWS = 512
"""Rows in flight."""
POLL = {"cpu": 1, "cuda": 16}
"""Steps between two looks at which rows are finished."""
DEFAULT = Sampling()
BAR_DELAY = 5.0
"""Seconds before a rollout shows its progress bar."""


class RolloutCancelled(Exception):
    """A rollout that nobody waits for any more."""


class RolloutEngine:
    """Generates from `policy.module` as it is at each call: edit a weight, and the next call sees it."""

    def __init__(
        self,
        policy: Policy,
        processor: Processor | None = None,
        *,
        cache_tokens: int | None = None,
        max_rows: int = MAX_ROWS,
        keep_cache: bool = True,
        attention: str = "auto",
        graphs: bool | None = None,
        capture: Capture | None = None,
        poll: int | None = None,
    ) -> None:
        """
        Args:
            processor: for stop texts.
            cache_tokens: size of the key-value cache; None: what the prompts of a call need, up to a share of the
                free memory.
            max_rows: rows in flight (a whole group, if that is more).
            keep_cache: False frees cache, joined weights and graphs after every call.
            attention: one of `vtfast.rollout.attention.BACKENDS`, or auto.
            graphs: replay the step from CUDA graphs; None: on CUDA. `capture` stands in for CUDA's in tests.
            poll: steps between two looks at the finished rows; None: POLL of the device.

        Raises UserError for a model with sliding windows.
        """
        if layer_types(policy.language_model.config) != {"full_attention"}:
            raise UserError("the rollout does not support sliding-window attention")
        kind = policy.device.type
        self.policy, self.processor = policy, processor
        self.cache_tokens, self.max_rows, self.keep_cache = cache_tokens, max_rows, keep_cache
        self.attention = decode_attention(attention, policy.device, policy.head.dtype)
        capturable = kind == "cuda" and self.attention is not decode_attention("torch")
        self.graphs = capturable if graphs is None else graphs
        self.capture, self.poll = capture, poll or POLL[kind]
        self.workspace: Workspace | None = None
        self.should_cancel: Callable[[], object] | None = None
        """Asked every `poll` steps, if set: whether `generate` is to end at once, with RolloutCancelled."""
        self.last_timings: dict[str, float] = {}
        """Of the last call: spent on prefill and on decode."""
        self.max_pages: int | None = None
        """Of the cache, once the memory has not done for more."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        num_generations: int = 1,
        sampling: Sampling = DEFAULT,
        seed: int = 0,
        progress: bool = False,
    ) -> list[list[Completion]]:
        """`num_generations` completions of each prompt: `result[p][g]`.

        `progress`: a bar with tokens/s and rows alive, once the rollout takes a few seconds. Where the memory does not
        do, fewer rows are admitted at once, from then on, and the call starts again: its result is the same. Raises
        UserError for a prompt that does not fit into the cache, and when one group alone is too much for the memory;
        RolloutCancelled when `should_cancel` says so.
        """
        self.last_timings = {}
        if not prompts:
            return []
        while True:
            try:
                return self._generate(prompts, num_generations, sampling, seed, progress)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            self._admit_fewer(prompts, num_generations, sampling.max_new_tokens, reason)

    def _generate(
        self, prompts: Sequence[Prompt], num_generations: int, sampling: Sampling, seed: int, progress: bool
    ) -> list[list[Completion]]:
        bar = tqdm(
            total=len(prompts) * num_generations * sampling.max_new_tokens,
            desc="rollout",
            unit="token",
            delay=BAR_DELAY,
            leave=False,
            disable=not progress,
        )
        with self._plain():
            run = self.start(prompts, num_generations, sampling, seed)
            try:
                while run.step():
                    watchdog.beat()
                    if self.should_cancel and self.should_cancel():
                        raise RolloutCancelled
                    bar.set_postfix_str(f"{len(run.running)} rows alive", refresh=False)
                    bar.update(run.written - bar.n)
                self.last_timings = run.timings
                return run.collect()
            finally:
                bar.close()
                run.release()
                if not self.keep_cache:
                    self.workspace = None

    def start(
        self, prompts: Sequence[Prompt], num_generations: int = 1, sampling: Sampling = DEFAULT, seed: int = 0
    ) -> Scheduler:
        """A rollout that its caller advances. One at a time: it works in the engine's workspace."""
        if num_generations < 1:
            raise UserError(f"num_generations {num_generations}: must be at least 1")
        if sampling.stop and self.processor is None:
            raise UserError("stop: RolloutEngine needs a processor to find texts in tokens")
        with self._plain():
            work = self._workspace(prompts, num_generations, sampling.max_new_tokens)
            return Scheduler(
                self.policy,
                work,
                prompts,
                num_generations,
                sampling,
                seed,
                max_rows=self.max_rows,
                poll=self.poll,
                processor=self.processor,
            )

    def _admit_fewer(self, prompts: Sequence[Prompt], group: int, new: int, reason: str) -> None:
        """Let go of everything, and halve rows in flight and cache. One group is the least there is."""
        held, self.workspace = self.workspace, None
        pages = None if held is None else held.cache.pages
        del held
        free_memory()
        least = max(self._pages(prompts, group, new))
        if pages is None:
            wanted = self._size(prompts, group, new).cache_pages
            pages = self._cache_pages(wanted, PAGE_SIZE[self.policy.device.type], least)
        rows = min(len(prompts) * group, max(self.max_rows, group))
        if rows <= group and pages <= least:
            raise RankError(
                f"rollout: out of memory ({reason}) with the {group} completions of one prompt in flight; lower"
                " --num_generations, --max_completion_length, --max_prompt_length or --max_pixels"
            )
        self.max_rows, self.max_pages = max(rows // 2, group), max(pages // 2, least)
        log.warning(
            "rollout: out of memory (%s); rows in flight %d -> %d, cache pages %d -> %d, the same prompts again",
            reason,
            rows,
            self.max_rows,
            pages,
            self.max_pages,
        )

    @contextlib.contextmanager
    def _plain(self) -> Iterator[None]:
        """Without gradients, and without what the caller may be in: buffers outlive a call, so they must be ordinary
        tensors, and of the weights' own precision."""
        off = torch.autocast(self.policy.device.type, enabled=False)
        with torch.inference_mode(False), torch.no_grad(), off:
            yield

    def _workspace(self, prompts: Sequence[Prompt], group: int, new: int) -> Workspace:
        """The one at hand, with the weights of this moment. A new one if it is too small (then one that would do for
        both calls, so that calls of different shapes settle), or if the weights have moved."""
        policy, work = self.policy, self.workspace
        if work is not None and (work.weights != addresses(policy) or work.dtype != policy.head.dtype):
            log.info("rollout: the weights have moved; what knew their addresses is made anew")
            self.workspace = work = None
        size, least = self._size(prompts, group, new), max(self._pages(prompts, group, new))
        if work is not None and (
            not size.fits_into(work.size)
            or (self.max_pages is not None and work.cache.pages < least)
            or work.eos_ids != tuple(policy.eos_ids)
        ):
            size = size.and_also(work.size)
            self.workspace = work = None  # its memory first
        if work is None:
            page = PAGE_SIZE[policy.device.type]
            pages = self._cache_pages(size.cache_pages, page, least)
            work = Workspace(policy, size, pages, page, self.attention, self.capture, self.graphs)
            self.workspace = work
        work.decoder.refresh()
        return work

    def _size(self, prompts: Sequence[Prompt], group: int, new: int) -> Size:
        """What these prompts need, with as many groups in flight as `max_rows` lets."""
        page = PAGE_SIZE[self.policy.device.type]
        needs = sorted(self._pages(prompts, group, new), reverse=True)
        longest = max(len(prompt.ids) for prompt in prompts) + new
        in_flight = min(len(prompts) * group, max(self.max_rows, group))
        return Size(
            cache_pages=sum(needs[: max(1, self.max_rows // group)]) if self.cache_tokens is None else 0,
            rows=bucket(in_flight) if self.graphs else in_flight,
            pages_a_row=-(-longest // page) + 1,
            outputs=len(prompts) * group,
            tokens=new,
            positions=-(-longest // page) * page,
        )

    def _pages(self, prompts: Sequence[Prompt], group: int, new: int) -> list[int]:
        """Cache pages that each prompt needs together with its completions."""
        page = PAGE_SIZE[self.policy.device.type]
        pages = (pages_needed(page, len(prompt.ids), new) for prompt in prompts)
        return [shared + group * own for shared, own in pages]

    def _cache_pages(self, wanted: int, page: int, least: int) -> int:
        """`least`: what the largest group needs, to which running out of memory does not reduce the cache."""
        most = max(least, self.max_pages) if self.max_pages is not None else None
        if self.cache_tokens is not None:
            return _at_most(-(-self.cache_tokens // page), most)
        device = self.policy.device
        layers, heads, head_dim = cache_shape(self.policy)
        bytes_a_page = 2 * layers * page * heads * head_dim * self.policy.head.element_size()
        room = int(CACHE_SHARE[device.type] * _free_memory(device)) // bytes_a_page
        wanted = _at_most(wanted, most)
        require_full_size(wanted, room, "cache pages", "--rollout_cache_tokens")
        if room < wanted:
            log.info("rollout: memory for %d cache pages of the %d wanted; prompts will wait", room, wanted)
        return min(wanted, max(room, 1))


def _at_most(number: int, most: int | None) -> int:
    return number if most is None else min(number, most)


def _free_memory(device: torch.device) -> int:
    """Bytes, those included that PyTorch holds and does not use."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    import psutil

    return psutil.virtual_memory().available
