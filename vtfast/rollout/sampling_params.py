"""How to sample, and the completions that come out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass as pydantic_dataclass


@pydantic_dataclass(frozen=True)
class Sampling:
    """How to sample. By default the full softmax at `temperature`: the distribution that the loss differentiates.

    Nothing is read from the checkpoint's generation_config. The settings under "Logits warpers" change the
    distribution, so that the returned log-probs are no longer the policy's; they take a slower path that holds the
    logits. A value out of its bounds raises ValueError.
    """

    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Divides the logits; the loss must use the same one."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    """Most tokens of a completion, the end-of-sequence token included."""
    greedy: bool = False
    """Take the most probable token instead of sampling."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Strings that end a completion; the token that completes one is kept. Needs the engine's `processor`."""

    # Logits warpers
    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    """No end-of-sequence token before this many tokens."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Keep the most probable tokens that together reach this probability."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Keep tokens with at least this share of the most probable one's probability."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Above 1: tokens of the prompt and of the completion so far become less likely (as in transformers)."""

    def __post_init__(self) -> None:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens {self.min_new_tokens}: more than max_new_tokens, {self.max_new_tokens}")

    @property
    def warped(self) -> bool:
        """Whether the distribution differs from the softmax at `temperature`."""
        return (
            self.min_new_tokens > 0
            or self.top_k > 0
            or self.top_p < 1
            or self.min_p > 0
            or self.repetition_penalty != 1
        )


@dataclass(frozen=True)
class Completion:
    """One sampled completion of a prompt."""

    tokens: list[int]
    """Token ids; the end-of-sequence token belongs to the completion."""
    logprobs: list[float]
    """Log-probability of each token under the distribution that it was drawn from."""
    finish_reason: str
    """stop (an end-of-sequence token, or a stop string) or length."""


def row_key(prompt_key: int, sample: int) -> int:
    """Return the key of one row's randomness. Odd-constant mixing keeps neighbouring samples of a prompt unrelated."""
    mixed = (prompt_key + (sample + 1) * 0x9E3779B97F4A7C15) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    return (mixed ^ (mixed >> 31)) >> 1
