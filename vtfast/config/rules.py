"""Rules between settings: they refuse values that are valid alone and contradict each other.

They refuse a setting that another one switches off, because a user who sets it expects an effect. Each rule takes the
sections that it reads. `runs.py` calls the rules that apply to a kind of run.
"""

from __future__ import annotations

from collections.abc import Iterator

from vtfast_kernels.loss_types import TOKEN_LEVEL

from vtfast.config.fields import GRPO, Optimizer, Rollout, Task
from vtfast.config.problems import Problem
from vtfast.config.section import Section

PIXELS_A_TOKEN = 28 * 28
"""Pixels of an image per token, in every family: 2 x 2 patches of 14 x 14 pixels are merged into a token."""
VISION_MARKER_TOKENS = 2
"""The `<|vision_start|>` and `<|vision_end|>` tokens around an image."""
UNUSED_BY_LOSS = {
    "cispo": ("delta",),
    "sapo": ("delta", "epsilon", "epsilon_high"),
    "vespo": ("delta", "epsilon", "epsilon_high"),
}
"""By loss type: the bounds of the ratio that it does not use (`vtfast_kernels.objective`)."""


def no_effect_without(section: Section, switch: str, *names: str) -> Iterator[Problem]:
    """Yields a problem for each of `names` that was changed, because `switch` is off and they have no effect."""
    for name in names:
        if name in section.changed():
            yield Problem(f"--{name}: has no effect without --{switch} true; leave it out, or add that", (name, switch))


def check_lora(task: Task) -> Iterator[Problem]:
    if not task.use_peft:
        yield from no_effect_without(task, "use_peft", "lora_r", "lora_alpha", "lora_target_modules")
        return
    if not task.lora_target_modules:
        yield Problem("--lora_target_modules: name at least one linear layer", ("lora_target_modules", "use_peft"))
    if task.freeze:
        yield Problem(
            "--freeze: has no effect with --use_peft, which trains adapters alone; choose one of the two",
            ("freeze", "use_peft"),
        )


def check_image_size(task: Task) -> Iterator[Problem]:
    if task.max_pixels < task.min_pixels:
        yield Problem(
            f"--max_pixels {task.max_pixels}: smaller than --min_pixels {task.min_pixels}", ("max_pixels", "min_pixels")
        )
    smallest = -(-task.min_pixels // PIXELS_A_TOKEN) + VISION_MARKER_TOKENS
    if smallest >= task.max_prompt_length:
        most = max(1, task.max_prompt_length - VISION_MARKER_TOKENS - 1) * PIXELS_A_TOKEN
        yield Problem(
            f"--max_prompt_length {task.max_prompt_length}: the smallest image takes {smallest} tokens"
            f" (--min_pixels {task.min_pixels}); raise it, or lower --min_pixels below {most}",
            ("max_prompt_length", "min_pixels"),
        )


def check_sampler(rollout: Rollout) -> Iterator[Problem]:
    if not rollout.use_vllm:
        yield from no_effect_without(rollout, "use_vllm", "vllm_gpu_memory_utilization", "vllm_enable_sleep_mode")
        return
    for name in ("rollout_max_rows", "rollout_cache_tokens", "rollout_keep_cache", "rollout_attention"):
        if name in rollout.changed():
            yield Problem(f"--{name}: has no effect with --use_vllm true; leave one of them out", (name, "use_vllm"))


def check_reproducibility(optimizer: Optimizer, rollout: Rollout) -> Iterator[Problem]:
    if optimizer.deterministic and rollout.use_vllm:
        yield Problem(
            "--deterministic true: vLLM does not guarantee bitwise equal results; leave out --use_vllm",
            ("deterministic", "use_vllm"),
        )


def check_reward_timeout(task: Task, grpo: GRPO) -> Iterator[Problem]:
    if 0 < task.rank_timeout <= grpo.reward_timeout:
        yield Problem(
            f"--rank_timeout {task.rank_timeout:g}: must be above --reward_timeout {grpo.reward_timeout:g}",
            ("rank_timeout", "reward_timeout"),
        )


def check_reward_weights(grpo: GRPO) -> Iterator[Problem]:
    if grpo.reward_weights is not None and len(grpo.reward_weights) != len(grpo.reward_funcs):
        yield Problem(
            f"--reward_weights: {len(grpo.reward_weights)} weights for {len(grpo.reward_funcs)} rewards"
            f" ({', '.join(grpo.reward_funcs)})",
            ("reward_weights", "reward_funcs"),
        )


def check_reference(task: Task, grpo: GRPO) -> Iterator[Problem]:
    if grpo.offload_reference and (grpo.beta == 0 or task.use_peft):
        yield Problem(
            "--offload_reference: there is no copy to move with --beta 0 or --use_peft; leave it out",
            ("offload_reference", "beta", "use_peft"),
        )


def check_loss(grpo: GRPO) -> Iterator[Problem]:
    if grpo.importance_sampling_level == "sequence" and grpo.loss_type in TOKEN_LEVEL:
        yield Problem(
            f"--importance_sampling_level sequence: not defined for --loss_type {grpo.loss_type}; use token",
            ("importance_sampling_level", "loss_type"),
        )
    for name in UNUSED_BY_LOSS.get(grpo.loss_type, ()):
        if name in grpo.changed():
            yield Problem(
                f"--{name}: has no effect with --loss_type {grpo.loss_type}; leave it out", (name, "loss_type")
            )


def check_sampler_correction(grpo: GRPO) -> Iterator[Problem]:
    low, high = grpo.vllm_importance_sampling_clip_min, grpo.vllm_importance_sampling_clip_max
    if low is not None and high is not None and low > high:
        yield Problem(
            f"--vllm_importance_sampling_clip_min {low}: above --vllm_importance_sampling_clip_max {high}",
            ("vllm_importance_sampling_clip_min", "vllm_importance_sampling_clip_max"),
        )
    if not grpo.vllm_importance_sampling_correction:
        yield from no_effect_without(
            grpo,
            "vllm_importance_sampling_correction",
            "vllm_importance_sampling_mode",
            "vllm_importance_sampling_clip_max",
            "vllm_importance_sampling_clip_min",
        )


def find_warnings(task: Task, optimizer: Optimizer) -> Iterator[str]:
    """Settings that a run accepts and that are probably not meant."""
    if optimizer.max_steps is not None and optimizer.max_steps <= optimizer.warmup_steps:
        yield (
            f"--warmup_steps {optimizer.warmup_steps}: the learning rate does not reach its peak within"
            f" --max_steps {optimizer.max_steps}"
        )
    if task.eval_data == "synthetic" != task.data:
        yield (
            "--eval_data synthetic: the held-out questions are the demo's and unlike those of --data; name your own"
            " held-out data, or none"
        )
