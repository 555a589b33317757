"""From samples to tokenized prompts: which questions a run asks, in which order, and each step's share of a rank."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from vtfast import synthetic
from vtfast.config import RunConfig
from vtfast.data import RECOGNISED, Columns, Sample, Selection, load_samples, shuffle_options
from vtfast.errors import UserError
from vtfast.images import image_sizes
from vtfast.processor import Processor, Prompt
from vtfast.prompts import load_template, render

log = logging.getLogger("vtfast")
SYNTHETIC = "synthetic"
SYNTHETIC_TRAIN = 2048


@dataclass(frozen=True)
class Question:
    """A sample with its tokenized prompt."""

    sample: Sample
    prompt: Prompt
    index: int = -1
    """Place of the sample among those of the run, by which any rank can ask it again."""


class Asker:
    """Turns samples into questions with one template and one processor."""

    def __init__(self, config: RunConfig, processor: Processor) -> None:
        self.processor = processor
        self.template = load_template(config.template)
        self.literal_image = config.literal_image
        self.max_prompt_length = config.max_prompt_length
        self.on_bad_sample = config.on_bad_sample
        self.skipped: list[dict] = []
        """Samples that were left out and why, until `take_skipped`."""

    def skip(self, sample: Sample, reason: str | Exception, step: int = 0) -> None:
        """Leave a sample out and write down why. The trainer, who hears of it from all ranks, lists it or stops."""
        log.warning("step %d: skipped %s: %s", step, sample.where, reason)
        where = {"row": sample.row, "where": sample.where}
        self.skipped.append({"step": step, **where, "reason": str(reason)})

    def take_skipped(self) -> list[dict]:
        taken, self.skipped = self.skipped, []
        return taken

    def ask(self, sample: Sample, index: int = -1) -> Question:
        prompt = self.processor.encode(self.text(sample), sample.images)
        return Question(sample, prompt, index)

    def text(self, sample: Sample) -> str:
        return render(self.template, sample, literal_image=self.literal_image)

    def fitting(self, samples: Sequence[Sample], name: str) -> list[Sample]:
        """Samples whose prompt fits into max_prompt_length."""
        return self.sound(samples, name, self._misfit)

    def sound(
        self, samples: Sequence[Sample], name: str, problem_of: Callable[[Sample], str | None]
    ) -> list[Sample]:
        """Samples without a problem; the others are counted, named in the log and listed. Raises UserError for the
        first under `on_bad_sample: error`, and where none is left."""
        good, bad = [], []
        for sample in samples:
            problem = problem_of(sample)
            if problem is None:
                good.append(sample)
                continue
            bad.append(f"{sample.where}: {problem}")
            where = {"row": sample.row, "where": sample.where}
            self.skipped.append({"step": 0, "source": name, **where, "reason": problem})
            if self.on_bad_sample == "error":
                raise UserError(f"{name}: {bad[0]}")
        if bad:
            first = "; ".join(bad[:3])
            log.warning("%s: skipped %d of %d samples: %s", name, len(bad), len(samples), first)
        if not good:
            raise UserError(f"{name}: none of its {len(samples)} samples can be used; {bad[0]}")
        return good

    def _misfit(self, sample: Sample) -> str | None:
        try:
            text, sizes = self.text(sample), image_sizes(sample.images)
            length = self.processor.prompt_length(text, sizes)
        except UserError as error:
            return str(error)
        if length > self.max_prompt_length:
            return (
                f"the prompt has {length} tokens and --max_prompt_length is {self.max_prompt_length}"
                " (raise it, or lower --max_pixels)"
            )
        return None


def load_questions(config: RunConfig, asker: Asker, rendered: Path) -> dict[str, list[Sample]]:
    """Samples by split, "train" and "val" (held out; absent without `eval_data`).

    `rendered`: the folder of `render_synthetic`; its files are read like any others.
    """
    sources = {
        "train": (config.data, config.split, config.first_n, config.first_rows),
        "val": (config.eval_data, config.eval_split, config.eval_samples, None),
    }
    samples = {}
    for split, (source, of_source, limit, first_rows) in sources.items():
        if source is None:
            continue
        named = columns(config)
        if source == SYNTHETIC:
            source, named = rendered / f"{split}.parquet", RECOGNISED
        loaded = load_samples(
            source,
            of_source,
            limit,
            on_bad=config.on_bad_sample,
            columns=named,
            selection=selection(config),
            first_rows=first_rows,
        )
        asker.skipped += [
            {
                "step": 0,
                "source": str(source),
                "row": row,
                "where": loaded.where[row],
                "reason": reason,
            }
            for row, reason in loaded.skipped
        ]
        samples[split] = asker.fitting(shuffle_options(loaded, config.seed), str(source))
    return samples


def columns(config: RunConfig) -> Columns:
    """The column names that the settings give."""
    return Columns(
        config.question_column, config.answer_column, config.options_column, config.image_column
    )


def selection(config: RunConfig) -> Selection:
    """The rows that the settings ask for."""
    types = config.question_types
    return Selection(config.static, None if types is None else tuple(types))


def render_synthetic(config: RunConfig, folder: Path) -> Path:
    """Write train.parquet and val.parquet of the embedded default, if `config` asks for either."""
    if SYNTHETIC in (config.data, config.eval_data):
        synthetic.write_dataset(
            folder, train=SYNTHETIC_TRAIN, val=config.eval_samples, seed=config.seed
        )
    return folder


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
    asker: Asker,
    samples: Sequence[Sample],
    steps: Sequence[int],
    *,
    per_rank: int,
    rank: int,
    ranks: int,
    seed: int,
    every: int = 1,
) -> Iterator[list[Question]]:
    """This rank's questions of each step; the next step's images are decoded while this one trains.

    `every`: optimizer steps that live on one set of questions; `steps` names the first of each.
    """

    def prepare(step: int) -> list[Question]:
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
