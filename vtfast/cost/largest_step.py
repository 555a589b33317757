"""The largest step that the settings allow.

Everything is at its limit: each prompt is as long as `max_prompt_length`, each completion as long as
`max_completion_length`, each prompt has one image of `max_pixels` (or as much of it as the prompt holds).

P tokens of a prompt, C of a completion, T of a packed row, N scored tokens of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from vtfast.config import RunConfig
from vtfast.config.rules import PIXELS_A_TOKEN

PATCHES_PER_TOKEN = 4


@dataclass(frozen=True)
class Workload:
    """The largest inputs of one rank."""

    prompts: int
    """Prompts of a rank in a step."""
    group: int
    """G, completions per prompt."""
    prompt: int
    """P"""
    completion: int
    """C"""
    image: int
    """Tokens of a prompt's image."""
    tokens: int
    """T, of the longest micro-batch."""
    micro_batches: int

    @property
    def prompts_per_micro_batch(self) -> int:
        """Prompts of a micro-batch that is full of long completions."""
        return max(1, -(-self.tokens // (self.prompt + self.group * self.completion)))

    @property
    def scored(self) -> int:
        """N, of the longest micro-batch."""
        return max(self.completion, self.tokens - self.prompts_per_micro_batch * self.prompt)

    @property
    def images_per_micro_batch(self) -> int:
        """Images of a micro-batch whose completions are short, so that it holds more prompts."""
        return min(self.prompts, max(1, self.tokens // (self.prompt + self.group)))

    @property
    def key_rows(self) -> int:
        """Rows of gathered keys in a micro-batch: a prompt's own, and for each completion the prompt's and its own."""
        completions = self.scored // self.completion
        return self.prompts_per_micro_batch * self.prompt + completions * (self.prompt + self.completion)


def workload_of(config: RunConfig, has_images: bool) -> Workload:
    """The limits of a run. A step is cut into rows of at most `tokens_per_micro_batch` tokens; a prompt with one
    completion always fits."""
    group = getattr(config, "num_generations", 1)
    P, C, prompts = config.max_prompt_length, config.max_completion_length, config.prompts_per_rank
    step = prompts * (P + group * C)
    tokens = max(P + C, min(config.tokens_per_micro_batch, step))
    image = min(P, config.max_pixels // PIXELS_A_TOKEN) if has_images else 0
    return Workload(prompts, group, P, C, image, tokens, micro_batches=-(-step // tokens))
