"""How to sample, and the completions that come out."""

from __future__ import annotations

from dataclasses import dataclass

from vtfast.utils.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How to sample. By default the full softmax at `temperature`: the distribution that the loss differentiates.

    Nothing is read from the checkpoint's generation_config. The settings under "Logits warpers" change the
    distribution, so that the returned log-probs are no longer the policy's; they take a slower path that holds the
    logits.
    """

    temperature: float = 1.0
    """Divides the logits; the loss must use the same one."""
    max_new_tokens: int = 64
    """Most tokens of a completion, the end-of-sequence token included."""
    greedy: bool = False
    """Take the most probable token instead of sampling."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion; the token that completes one is kept. Needs the engine's `processor`."""

    # Logits warpers
    min_new_tokens: int = 0
    """No end-of-sequence token before this many tokens."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the most probable tokens that together reach this probability."""
    min_p: float = 0.0
    """Keep tokens with at least this share of the most probable one's probability."""
    repetition_penalty: float = 1.0
    """Above 1: tokens of the prompt and of the completion so far become less likely (as in transformers)."""

    def __post_init__(self) -> None:
        problems = {
            "temperature": (
                0 < self.temperature < float("inf"),
                "must be above 0 and finite (use greedy=True for the most probable token)",
            ),
            "stop": (
                isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop),
                "must be a tuple of non-empty strings",
            ),
            "max_new_tokens": (self.max_new_tokens >= 1, "must be at least 1"),
            "min_new_tokens": (
                0 <= self.min_new_tokens <= self.max_new_tokens,
                f"must be between 0 and max_new_tokens, {self.max_new_tokens}",
            ),
            "top_k": (self.top_k >= 0, "must not be negative"),
            "top_p": (0 < self.top_p <= 1, "must be above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "must be between 0 and 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "must be above 0"),
        }
        for name, (ok, message) in problems.items():
            if not ok:
                raise UserError(f"{name} {getattr(self, name)}: {message}")

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
