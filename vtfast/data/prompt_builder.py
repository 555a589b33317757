"""From samples to tokenized prompts: which questions a run asks, in which order, and each step's share of a rank."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vtfast.config import RunConfig
from vtfast.data import Sample
from vtfast.data.images import image_sizes
from vtfast.data.processor import Processor
from vtfast.data.prompt import Prompt
from vtfast.data.prompt_templates import load_template, render
from vtfast.utils.errors import UserError

log = logging.getLogger("vtfast")


@dataclass(frozen=True)
class EncodedSample:
    """A sample with its tokenized prompt."""

    sample: Sample
    prompt: Prompt
    index: int = -1
    """Place of the sample among those of the run, by which any rank can ask it again."""


class PromptBuilder:
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

    def ask(self, sample: Sample, index: int = -1) -> EncodedSample:
        prompt = self.processor.encode(self.text(sample), sample.images)
        return EncodedSample(sample, prompt, index)

    def text(self, sample: Sample) -> str:
        return render(self.template, sample, literal_image=self.literal_image)

    def fitting(self, samples: Sequence[Sample], name: str) -> list[Sample]:
        """Samples whose prompt fits into max_prompt_length."""
        return self.sound(samples, name, self._misfit)

    def sound(self, samples: Sequence[Sample], name: str, problem_of: Callable[[Sample], str | None]) -> list[Sample]:
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
