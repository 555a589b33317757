"""What a run of each kind can be told, and which of it makes no sense."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import yaml
from vtfast_kernels.loss_names import LOSS_TYPES, SAMPLER_MODES, TOKEN_LEVEL

from vtfast.config.combinations import impossible_combinations, odd_combinations
from vtfast.config.problems import SettingsError
from vtfast.config.sections import GRPO, SFT, Optimizer, Output, Rollout, Task

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
ATTENTION = ("auto", "flash_attn_3", "flash_attn", "varlen", "sdpa")
DECODE_ATTENTION = ("auto", "flash_attn_3", "flash_attn", "triton", "varlen", "torch")
FREEZABLE = ("vision", "merger", "language", "embeddings")


class Checks:
    """What is said about impossible settings. A rule about a setting that a kind of run lacks is passed over."""

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise SettingsError(problems)

    def _problems(self) -> Iterator[str]:
        """All impossible settings at once, each with the values that would do."""
        choices = {
            "dtype": ("auto", "float32", "bfloat16"),
            "device": ("auto", "cpu", "cuda"),
            "on_bad_sample": ("skip", "error"),
            "on_save_error": ("stop", "continue"),
            "reward_mode": ("strict", "recipe"),
            "scale_rewards": ("group", "batch", "none"),
            "loss_type": LOSS_TYPES,
            "importance_sampling_level": ("token", "sequence"),
            "lr_scheduler_type": SCHEDULES,
            "vllm_importance_sampling_mode": SAMPLER_MODES,
            "attn_implementation": ATTENTION,
            "rollout_attention": DECODE_ATTENTION,
            "roofline_rates": ("data_sheet", "measured"),
        }
        for name, allowed in choices.items():
            if getattr(self, name, allowed[0]) not in allowed:
                yield f"--{name} {getattr(self, name)}: must be one of {', '.join(allowed)}"
        if not re.fullmatch(r"\w[\w.-]*", self.recipe):  # it names the run's folder under runs/
            yield f"--recipe {self.recipe}: must be a plain name, such as {type(self).recipe}"
        for part in self.freeze:
            if part not in FREEZABLE:
                yield f"--freeze {part}: must be among {', '.join(FREEZABLE)}"
        for tracker in self.report_to:
            if tracker not in ("tensorboard", "wandb", "trackio", "none"):
                yield f"--report_to {tracker}: must be tensorboard, wandb, trackio or none"
        for name in (
            "num_generations", "max_completion_length", "max_prompt_length", "max_steps", "min_pixels",
            "per_device_train_batch_size", "gradient_accumulation_steps", "eval_samples", "num_iterations", "lora_r",
            "lora_alpha", "rollout_max_rows", "max_nonfinite_steps", "ddp_timeout",
        ):  # fmt: skip
            if getattr(self, name, None) is not None and getattr(self, name) < 1:
                yield f"--{name} {getattr(self, name)}: must be at least 1"
        for name in (
            "beta",
            "learning_rate",
            "warmup_steps",
            "save_steps",
            "weight_decay",
            "max_grad_norm",
            "epsilon",
            "sampler_drift_warning",
            "kl_warning",
            "entropy_warning",
            "reward_workers",
            "seed",
            "roofline_steps",
            "rank_timeout",
        ):
            if getattr(self, name, 0) < 0:
                yield f"--{name} {getattr(self, name)}: must not be negative"
        for name in (
            "first_n", "first_rows", "save_total_limit", "num_processes", "cpu_threads", "token_budget",
            "rollout_cache_tokens",
        ):  # fmt: skip
            if getattr(self, name) is not None and getattr(self, name) < 1:
                yield f"--{name} {getattr(self, name)}: must be at least 1"
        for name in ("temperature", "adam_epsilon", "delta", "num_train_epochs", "reward_timeout"):
            if getattr(self, name, None) is not None and getattr(self, name) <= 0:
                yield f"--{name} {getattr(self, name)}: must be above 0"
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                yield f"--{name} {getattr(self, name)}: must be at least 0 and below 1"
        if self.use_peft and not self.lora_target_modules:
            yield "--lora_target_modules: name at least one linear layer"
        if self.use_peft and self.freeze:
            yield "--freeze: says nothing with --use_peft, which trains adapters alone; choose one of the two"
        if 0 < self.rank_timeout <= getattr(self, "reward_timeout", 0):
            yield f"--rank_timeout {self.rank_timeout:g}: must be above --reward_timeout {self.reward_timeout:g}"
        if self.deterministic and self.use_vllm:
            yield "--deterministic true: vLLM does not promise the same bits twice; leave out --use_vllm"
        if self.max_pixels < self.min_pixels:
            yield f"--max_pixels {self.max_pixels}: smaller than --min_pixels {self.min_pixels}"
        if not 0 < self.vllm_gpu_memory_utilization <= 1:
            yield f"--vllm_gpu_memory_utilization {self.vllm_gpu_memory_utilization}: must be above 0 and at most 1"
        yield from impossible_combinations(self)

    def warnings(self) -> list[str]:
        """What these settings say and their user may not have meant."""
        return list(odd_combinations(self))

    def to_yaml(self) -> str:
        return yaml.safe_dump(asdict(self), sort_keys=False)


@dataclass
class Config(Checks, Output, Optimizer, Rollout, GRPO, Task):
    """Settings of a GRPO run. Bases are named last section first: that is how a dataclass orders their fields."""

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        if self.importance_sampling_level == "sequence" and self.loss_type in TOKEN_LEVEL:
            yield (
                f"--importance_sampling_level sequence: not defined for --loss_type {self.loss_type};"
                " use token"
            )
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
