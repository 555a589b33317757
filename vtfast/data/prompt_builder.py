"""Sample -> tokenized prompt, with the template and the processor of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vtfast.config import RunConfig
from vtfast.data import Sample
from vtfast.data.images import image_sizes
from vtfast.data.processor import Processor
from vtfast.data.prompt import Prompt
from vtfast.data.prompt_templates import load_template, render
from vtfast.data.skip_log import SkipLog
from vtfast.utils.errors import UserError


@dataclass(frozen=True)
class EncodedSample:
    """A sample with its tokenized prompt."""

    sample: Sample
    prompt: Prompt
    index: int = -1
    """Index into the run's samples, by which any rank can build the prompt again."""


class PromptBuilder:
    """Builds the prompts of a run."""

    def __init__(self, config: RunConfig, processor: Processor) -> None:
        self.processor = processor
        self.template = load_template(config.template)
        self.literal_image = config.literal_image
        self.max_prompt_length = config.max_prompt_length

    def build(self, sample: Sample, index: int = -1) -> EncodedSample:
        """Raises UserError for images that cannot be decoded or resized."""
        return EncodedSample(sample, self.processor.encode(self.text(sample), sample.images), index)

    def text(self, sample: Sample) -> str:
        return render(self.template, sample, literal_image=self.literal_image)

    def drop_too_long(self, samples: Sequence[Sample], source: str, skip_log: SkipLog) -> list[Sample]:
        """Samples whose prompt fits into max_prompt_length; see `SkipLog.drop_invalid`."""
        return skip_log.drop_invalid(samples, source, self._length_problem)

    def _length_problem(self, sample: Sample) -> str | None:
        try:
            length = self.processor.prompt_length(self.text(sample), image_sizes(sample.images))
        except UserError as error:
            return str(error)
        if length <= self.max_prompt_length:
            return None
        return (
            f"the prompt has {length} tokens and --max_prompt_length is {self.max_prompt_length}"
            " (raise it, or lower --max_pixels)"
        )
