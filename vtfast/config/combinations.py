"""Settings that are fine alone and make no sense together.

A setting that another one silences is refused rather than ignored: who sets it believes that it does something.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vtfast.config.runs import RunConfig

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
OF_OUR_ROLLOUT = (
    "rollout_max_rows",
    "rollout_cache_tokens",
    "rollout_keep_cache",
    "rollout_attention",
)
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
