"""Settings that are fine alone and make no sense together.

A setting that another one silences is refused rather than ignored: who sets it believes that it does something.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import MISSING, asdict, fields
from typing import Any

import yaml
from vtfast_kernels.loss_names import LOSS_TYPES, SAMPLER_MODES

from vtfast.config.fields import ATTENTION, DECODE_ATTENTION, FREEZABLE, SCHEDULES
from vtfast.config.problems import SettingsError

RunConfig = Any
"""Config or SFTConfig (`runs.py`)."""

NEEDS = {
    "use_vllm": ("vllm_gpu_memory_utilization", "vllm_enable_sleep_mode"),
    "use_peft": ("lora_r", "lora_alpha", "lora_target_modules"),
    "vllm_importance_sampling_correction": (
        "vllm_importance_sampling_mode",
        "vllm_importance_sampling_clip_max",
        "vllm_importance_sampling_clip_min",
    ),
}
"""A switch, and the settings that say nothing while it is off."""
OF_OUR_ROLLOUT = ("rollout_max_rows", "rollout_cache_tokens", "rollout_keep_cache", "rollout_attention")
IGNORED_BY_LOSS = {
    "cispo": ("delta",),
    "sapo": ("delta", "epsilon", "epsilon_high"),
    "vespo": ("delta", "epsilon", "epsilon_high"),
}
"""By loss type: what bounds the ratio in the others (`vtfast_kernels.objective`)."""
PIXELS_A_TOKEN = 28 * 28
"""Of an image, in every family: 2 x 2 patches of 14 x 14 pixels are merged into a token."""
MARKS = 2
"""Tokens around an image."""


def impossible_combinations(config: RunConfig) -> Iterator[str]:
    yield from _silenced(config)
    smallest = -(-config.min_pixels // PIXELS_A_TOKEN) + MARKS
    if config.min_pixels > 0 and smallest >= config.max_prompt_length > 0:
        most = max(1, config.max_prompt_length - MARKS - 1) * PIXELS_A_TOKEN
        yield (
            f"--max_prompt_length {config.max_prompt_length}: the smallest image takes {smallest} tokens"
            f" (--min_pixels {config.min_pixels}); raise it, or lower --min_pixels below {most}"
        )
    rewards = getattr(config, "reward_funcs", [])
    for name in dict.fromkeys(name for name in rewards if rewards.count(name) > 1):
        yield f"--reward_funcs {name}: is named twice; name it once, with a weight in --reward_weights"
    if config.question_types == []:
        yield "--question_types: name at least one, or none for all"
    if config.recipe in (".", "..") or "/" in config.recipe or "\\" in config.recipe:
        yield f"--recipe {config.recipe}: a run folder is named after it, so it must not hold slashes"


def odd_combinations(config: RunConfig) -> Iterator[str]:
    """What a run can do and its user may not have meant."""
    if config.max_steps is not None and 0 < config.max_steps <= config.warmup_steps:
        yield (
            f"--warmup_steps {config.warmup_steps}: the learning rate does not reach its peak within"
            f" --max_steps {config.max_steps}"
        )
    if config.eval_data == "synthetic" != config.data:
        yield (
            "--eval_data synthetic: the held-out questions are the demo's, and not of the kind of --data; give rows of"
            " your own, or none"
        )


def _silenced(config: RunConfig) -> Iterator[str]:
    for switch, names in NEEDS.items():
        for name in names:
            if not getattr(config, switch, True) and _is_set(config, name):
                yield f"--{name}: says nothing without --{switch} true; leave it out, or add that"
    for name in OF_OUR_ROLLOUT:
        if config.use_vllm and _is_set(config, name):
            yield f"--{name}: says nothing with --use_vllm true; leave one of them out"
    loss_type = getattr(config, "loss_type", "")
    for name in IGNORED_BY_LOSS.get(loss_type, ()):
        if _is_set(config, name):
            yield f"--{name}: --loss_type {loss_type} does not know it; leave it out"


def _is_set(config: RunConfig, name: str) -> bool:
    """Whether a setting, where the kind of run has it, differs from its default."""
    entry = next((entry for entry in fields(config) if entry.name == name), None)
    return entry is not None and getattr(config, name) != _default(entry)


def _default(entry: Any) -> Any:
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


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
            "num_generations",
            "max_completion_length",
            "max_prompt_length",
            "max_steps",
            "min_pixels",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "eval_samples",
            "num_iterations",
            "lora_r",
            "lora_alpha",
            "rollout_max_rows",
            "max_nonfinite_steps",
            "ddp_timeout",
        ):
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
            "first_n",
            "first_rows",
            "save_total_limit",
            "num_processes",
            "cpu_threads",
            "token_budget",
            "rollout_cache_tokens",
        ):
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
