"""What a run of each kind can be told, and which of it makes no sense."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vtfast_kernels.loss_names import TOKEN_LEVEL

from vtfast.config.fields import GRPO, SFT, Optimizer, Output, Rollout, Task
from vtfast.config.rules import Checks


@dataclass
class Config(Checks, Output, Optimizer, Rollout, GRPO, Task):
    """Settings of a GRPO run. Bases are named last section first: that is how a dataclass orders their fields."""

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        if self.importance_sampling_level == "sequence" and self.loss_type in TOKEN_LEVEL:
            yield (f"--importance_sampling_level sequence: not defined for --loss_type {self.loss_type}; use token")
        bounds = {
            "top_k": (self.top_k >= 0, "must not be negative"),
            "top_p": (0 < self.top_p <= 1, "must be above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "must be between 0 and 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "must be above 0"),
        }
        for name, (holds, message) in bounds.items():
            if not holds:
                yield f"--{name} {getattr(self, name)}: {message}"
        if self.num_generations == 1:
            yield "--num_generations 1: a group of one has no advantage over itself; use 2 or more"
        if self.offload_reference and (self.beta == 0 or self.use_peft):
            yield "--offload_reference: there is no copy to move with --beta 0 or --use_peft; leave it out"
        if self.epsilon_high is not None and self.epsilon_high < 0:
            yield f"--epsilon_high {self.epsilon_high}: must not be negative"
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        if low is not None and high is not None and low > high:
            yield f"--vllm_importance_sampling_clip_min {low}: above --vllm_importance_sampling_clip_max {high}"
        if not self.reward_funcs:
            yield "--reward_funcs: name at least one reward"
        elif self.reward_weights is not None and len(self.reward_weights) != len(self.reward_funcs):
            yield (
                f"--reward_weights: {len(self.reward_weights)} weights for "
                f"{len(self.reward_funcs)} rewards ({', '.join(self.reward_funcs)})"
            )

    @property
    def tokens_per_pass(self) -> int:
        """`token_budget`, or what `per_device_train_batch_size` full groups would fill."""
        group = self.max_prompt_length + self.num_generations * self.max_completion_length
        return self.token_budget or self.per_device_train_batch_size * group


@dataclass
class SFTConfig(Checks, Output, Optimizer, Rollout, SFT, Task):
    """Settings of a supervised run."""

    recipe: str = "tiny-spatial-sft"
    """Name of the recipe that these settings started from."""
    learning_rate: float = 2e-5
    """Peak learning rate of AdamW."""
    max_steps: int | None = None
    """Optimizer steps; none: as many as num_train_epochs asks for."""

    @property
    def tokens_per_pass(self) -> int:
        """`token_budget`, or what `per_device_train_batch_size` of the longest samples would fill."""
        longest = self.max_prompt_length + self.max_completion_length
        return self.token_budget or self.per_device_train_batch_size * longest


RunConfig = Config | SFTConfig
