"""Batched sampling with the trainer's own weights: packed prefill, shared prompt pages, a decode step for all rows.

`Scheduler` holds the loop, `Workspace` the memory that it works in, `Decoder` the model's layers.

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
from vtfast.rollout.graphs import Capture, bucket
from vtfast.rollout.kv_cache import pages_needed
from vtfast.rollout.sampling_params import Completion, Sampling
from vtfast.rollout.scheduler import Scheduler
from vtfast.rollout.workspace import Workspace, WorkspaceSize, cache_shape, weight_addresses
from vtfast.utils.errors import RankError, UserError
from vtfast.utils.out_of_memory import catch_out_of_memory, free_memory

log = logging.getLogger("vtfast")

PAGE_SIZE = {"cpu": 16, "cuda": 256}
"""Tokens per cache page."""
CACHE_SHARE = {"cpu": 0.25, "cuda": 0.6}
"""Share of the free memory that the cache may take, unless a limit is given."""
MAX_ROWS = 512
"""Rows that run at once."""
DECODE_STEPS_PER_SYNC = {"cpu": 1, "cuda": 16}
"""Decode steps between two checks for finished rows."""
DEFAULT = Sampling()
BAR_DELAY = 5.0
"""Seconds before a rollout shows its progress bar."""


class RolloutCancelled(Exception):
    """`should_cancel` ended a rollout."""


class RolloutEngine:
    """Samples completions from a policy. Each call uses the current weights of `policy.module`."""

    def __init__(
        self,
        policy: Policy,
        processor: Processor | None = None,
        *,
        cache_tokens: int | None = None,
        cache_bytes: int | None = None,
        max_rows: int = MAX_ROWS,
        keep_cache: bool = True,
        attention: str = "auto",
        graphs: bool | None = None,
        capture: Capture | None = None,
        steps_per_sync: int | None = None,
    ) -> None:
        """
        Args:
            processor: needed for stop strings.
            cache_tokens: size of the key-value cache; None: what the prompts of a call need, up to `cache_bytes`.
            cache_bytes: limit of the cache; None: a share of the memory that is free when it is allocated.
            max_rows: rows that run at once (a whole group, if that is more).
            keep_cache: False frees cache, fused weights and graphs after every call.
            attention: one of `vtfast.rollout.attention.BACKENDS`, or auto.
            graphs: replay the step from CUDA graphs; None: on CUDA. `capture` stands in for CUDA's in tests.
            steps_per_sync: decode steps between two checks for finished rows; None: `DECODE_STEPS_PER_SYNC` of the
                device.

        Raises UserError for a model with sliding windows.
        """
        if layer_types(policy.language_model.config) != {"full_attention"}:
            raise UserError("the rollout does not support sliding-window attention")
        device = policy.device.type
        self.policy, self.processor = policy, processor
        self.cache_tokens, self.cache_bytes = cache_tokens, cache_bytes
        self.max_rows, self.keep_cache = max_rows, keep_cache
        self.attention = decode_attention(attention, policy.device, policy.head.dtype)
        self.graphs = (device == "cuda" and self.attention.capturable) if graphs is None else graphs
        self.capture, self.steps_per_sync = capture, steps_per_sync or DECODE_STEPS_PER_SYNC[device]
        self.page_size = PAGE_SIZE[device]
        self.workspace: Workspace | None = None
        self.should_cancel: Callable[[], object] | None = None
        """If set, called every `steps_per_sync` steps; a true result ends `generate` with RolloutCancelled."""
        self.last_timings: dict[str, float] = {}
        """Seconds of the last finished call, by phase: "prefill" and "decode". Empty while a call runs."""
        self.max_pages: int | None = None
        """Bound on the cache's pages; set when a call runs out of memory."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        num_generations: int = 1,
        sampling: Sampling = DEFAULT,
        seed: int = 0,
        progress: bool = False,
    ) -> list[list[Completion]]:
        """Return `num_generations` completions of each prompt: `result[p][g]`. Sets `last_timings`.

        `progress`: show a bar with tokens/s and running rows, once the rollout takes a few seconds. If it runs out of
        memory, this and later calls run fewer rows at once, and the call starts again: its result is the same.
        Raises UserError for a prompt that does not fit in the cache, RankError if one group alone does not fit in
        memory, and RolloutCancelled when `should_cancel` says so.
        """
        self.last_timings = {}
        if not prompts:
            return []
        while True:
            with catch_out_of_memory() as caught:
                completions = self._generate(prompts, num_generations, sampling, seed, progress)
            if caught.reason is None:
                return completions
            self._shrink(prompts, num_generations, sampling.max_new_tokens, caught.reason)

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
        with self._no_autograd():
            scheduler = self.start(prompts, num_generations, sampling, seed)
            try:
                while scheduler.step():
                    watchdog.beat()
                    if self.should_cancel and self.should_cancel():
                        raise RolloutCancelled
                    bar.set_postfix_str(f"{len(scheduler.running)} rows running", refresh=False)
                    bar.update(scheduler.num_tokens - bar.n)
                self.last_timings = scheduler.timings
                return scheduler.collect()
            finally:
                bar.close()
                scheduler.release()
                if not self.keep_cache:
                    self.workspace = None

    def start(
        self, prompts: Sequence[Prompt], num_generations: int = 1, sampling: Sampling = DEFAULT, seed: int = 0
    ) -> Scheduler:
        """Return a scheduler; the caller calls `step()`. Only one may be active, because it uses the engine's
        workspace."""
        assert num_generations >= 1
        if sampling.stop and self.processor is None:
            raise UserError("stop: RolloutEngine needs a processor to find strings in tokens")
        with self._no_autograd():
            workspace = self._prepare_workspace(prompts, num_generations, sampling.max_new_tokens)
            return Scheduler(
                self.policy,
                workspace,
                prompts,
                num_generations,
                sampling,
                seed,
                max_rows=self.max_rows,
                steps_per_sync=self.steps_per_sync,
                processor=self.processor,
            )

    def stop_keeping_cache(self) -> bool:
        """Free the workspace, and from now on after every call; whether there was one to free."""
        had_cache = self.workspace is not None
        self.workspace, self.keep_cache = None, False
        return had_cache

    @contextlib.contextmanager
    def _no_autograd(self) -> Iterator[None]:
        """Without gradients, and without the caller's inference mode and autocast: buffers outlive a call, so they must
        be ordinary tensors of the weights' own precision."""
        no_autocast = torch.autocast(self.policy.device.type, enabled=False)
        with torch.inference_mode(False), torch.no_grad(), no_autocast:
            yield

    def _shrink(self, prompts: Sequence[Prompt], group: int, new_tokens: int, reason: str) -> None:
        """Free the workspace, and halve running rows and cache, down to one group."""
        pages = None if self.workspace is None else self.workspace.cache.pages
        self.workspace = None
        free_memory()
        least = max(self._pages_per_prompt(prompts, group, new_tokens))
        if pages is None:
            pages = self._num_cache_pages(self._required_size(prompts, group, new_tokens).cache_pages, least)
        rows = min(len(prompts) * group, max(self.max_rows, group))
        if rows <= group and pages <= least:
            raise RankError(
                f"rollout: out of memory ({reason}) with the {group} completions of one prompt running; lower"
                " --num_generations, --max_completion_length, --max_prompt_length or --max_pixels"
            )
        self.max_rows, self.max_pages = max(rows // 2, group), max(pages // 2, least)
        log.warning(
            "rollout: out of memory (%s); running rows %d -> %d, cache pages %d -> %d, the same prompts again",
            reason,
            rows,
            self.max_rows,
            pages,
            self.max_pages,
        )

    def _prepare_workspace(self, prompts: Sequence[Prompt], group: int, new_tokens: int) -> Workspace:
        """Return the workspace, with the current weights. Reallocates it if it is too small or the weights were
        reallocated. The new one fits both the old and the new request."""
        policy, workspace = self.policy, self.workspace
        if workspace is not None and (
            workspace.weight_addresses != weight_addresses(policy) or workspace.dtype != policy.head.dtype
        ):
            log.info("rollout: weights were reallocated; rebuilding the KV cache and CUDA graphs")
            self.workspace = workspace = None
        size = self._required_size(prompts, group, new_tokens)
        least = max(self._pages_per_prompt(prompts, group, new_tokens))
        if workspace is not None and (
            not size.fits_in(workspace.size)
            or (self.max_pages is not None and workspace.cache.pages < least)
            or workspace.eos_ids != tuple(policy.eos_ids)
        ):
            size = size.maximum(workspace.size)
            self.workspace = workspace = None  # frees its memory before the new one is allocated
        if workspace is None:
            pages = self._num_cache_pages(size.cache_pages, least)
            workspace = Workspace(policy, size, pages, self.page_size, self.attention, self.capture, self.graphs)
            self.workspace = workspace
        workspace.decoder.refresh()
        return workspace

    def _required_size(self, prompts: Sequence[Prompt], group: int, new_tokens: int) -> WorkspaceSize:
        """Return what these prompts need, with as many running groups as `max_rows` allows."""
        pages = sorted(self._pages_per_prompt(prompts, group, new_tokens), reverse=True)
        pages_per_row = -(-(max(len(prompt.ids) for prompt in prompts) + new_tokens) // self.page_size)
        running = min(len(prompts) * group, max(self.max_rows, group))
        return WorkspaceSize(
            cache_pages=sum(pages[: max(1, self.max_rows // group)]) if self.cache_tokens is None else 0,
            rows=bucket(running) if self.graphs else running,
            pages_per_row=pages_per_row + 1,
            outputs=len(prompts) * group,
            max_new_tokens=new_tokens,
            max_positions=pages_per_row * self.page_size,
        )

    def _pages_per_prompt(self, prompts: Sequence[Prompt], group: int, new_tokens: int) -> list[int]:
        """Return the cache pages that each prompt needs together with its completions."""
        pages = (pages_needed(self.page_size, len(prompt.ids), new_tokens) for prompt in prompts)
        return [shared + group * own for shared, own in pages]

    def _num_cache_pages(self, needed: int, least: int) -> int:
        """Return the pages of a new cache: `needed`, limited by `cache_tokens`, `cache_bytes` and `max_pages`.
        `least`: what the largest group needs; `max_pages` does not go below it."""
        if self.cache_tokens is not None:
            return self._at_most_max_pages(-(-self.cache_tokens // self.page_size), least)
        device = self.policy.device
        layers, heads, head_dim = cache_shape(self.policy)
        bytes_per_page = 2 * layers * self.page_size * heads * head_dim * self.policy.head.element_size()
        limit = self.cache_bytes
        if limit is None:
            limit = int(CACHE_SHARE[device.type] * _free_bytes(device))
        room = limit // bytes_per_page - 1  # and a scratch page
        needed = self._at_most_max_pages(needed, least)
        require_full_size(needed, room, "cache pages", "--rollout_cache_tokens")
        if room < needed:
            log.info("rollout: memory for %d of %d cache pages; some prompts will wait", room, needed)
        return min(needed, max(room, 1))

    def _at_most_max_pages(self, pages: int, least: int) -> int:
        return pages if self.max_pages is None else min(pages, max(least, self.max_pages))


def _free_bytes(device: torch.device) -> int:
    """Return the free memory of the device, including what PyTorch holds and does not use."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    import psutil

    return psutil.virtual_memory().available
