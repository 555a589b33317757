"""Which samples each step takes, in which order; the next step's images are decoded while this one trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from vtfast.data import Sample
from vtfast.data.prompt_builder import EncodedSample, PromptBuilder
from vtfast.utils.errors import UserError


def order(samples: int, step: int, prompts: int, seed: int) -> list[int]:
    """Indices of the `prompts` samples that step `step` (from 1) asks: epoch after epoch, each freshly shuffled.

    A function of its arguments alone, so that ranks agree and any step can be asked again.
    """
    first = (step - 1) * prompts
    indices: list[int] = []
    for place in range(first, first + prompts):
        epoch, offset = divmod(place, samples)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        if not indices or offset == 0:
            shuffled = torch.randperm(samples, generator=generator)
        indices.append(int(shuffled[offset]))
    return indices


def batches(
    asker: PromptBuilder,
    samples: Sequence[Sample],
    steps: Sequence[int],
    *,
    per_rank: int,
    rank: int,
    ranks: int,
    seed: int,
    every: int = 1,
) -> Iterator[list[EncodedSample]]:
    """This rank's questions of each step; the next step's images are decoded while this one trains.

    `every`: optimizer steps that live on one set of questions; `steps` names the first of each.
    """

    def prepare(step: int) -> list[EncodedSample]:
        indices = order(len(samples), (step - 1) // every + 1, per_rank * ranks, seed)
        questions = []
        for i in indices[rank * per_rank : (rank + 1) * per_rank]:
            try:
                questions.append(asker.ask(samples[i], i))
            except UserError as error:
                asker.skip(samples[i], error, step)
        return questions

    with ThreadPoolExecutor(max_workers=1) as pool:
        upcoming = None
        for number, step in enumerate(steps):
            questions = upcoming.result() if upcoming else prepare(step)
            upcoming = pool.submit(prepare, steps[number + 1]) if number + 1 < len(steps) else None
            yield questions
