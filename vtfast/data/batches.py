"""Which samples each step takes, in which order; the next step's images are decoded while this one trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from vtfast.data import Sample
from vtfast.data.prompt_builder import EncodedSample, PromptBuilder
from vtfast.data.skip_log import SkipLog
from vtfast.utils.errors import UserError


def batch_indices(samples: int, step: int, prompts: int, seed: int) -> list[int]:
    """Indices of the `prompts` samples of batch `step` (from 1): epoch after epoch, each shuffled anew.

    A function of its arguments alone, so that ranks agree and a resumed run continues in the same order.
    """
    first = (step - 1) * prompts
    indices: list[int] = []
    for position in range(first, first + prompts):
        epoch, offset = divmod(position, samples)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        if not indices or offset == 0:
            shuffled = torch.randperm(samples, generator=generator)
        indices.append(int(shuffled[offset]))
    return indices


def batches(
    prompt_builder: PromptBuilder,
    skip_log: SkipLog,
    samples: Sequence[Sample],
    steps: Sequence[int],
    *,
    per_rank: int,
    rank: int = 0,
    ranks: int = 1,
    seed: int = 0,
    steps_per_batch: int = 1,
) -> Iterator[list[EncodedSample]]:
    """This rank's batches of `per_rank` prompts; the next batch is encoded in a thread while this one trains.

    `steps`: the optimizer steps that start with a new batch. `steps_per_batch`: optimizer steps that use one batch.
    """

    def encode(step: int) -> tuple[list[EncodedSample], list[tuple[Sample, UserError]]]:
        indices = batch_indices(len(samples), (step - 1) // steps_per_batch + 1, per_rank * ranks, seed)
        batch, failed = [], []
        for i in indices[rank * per_rank : (rank + 1) * per_rank]:
            try:
                batch.append(prompt_builder.build(samples[i], i))
            except UserError as error:
                failed.append((samples[i], error))
        return batch, failed

    with ThreadPoolExecutor(max_workers=1) as pool:
        upcoming = None
        for number, step in enumerate(steps):
            batch, failed = upcoming.result() if upcoming else encode(step)
            upcoming = pool.submit(encode, steps[number + 1]) if number + 1 < len(steps) else None
            for sample, error in failed:  # not in the thread: a skip counts in the step that it belongs to
                skip_log.add(sample, error, step)
            yield batch
