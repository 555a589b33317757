"""Which engine a run samples with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from vtfast.config import RunConfig
from vtfast.data.processor import Processor
from vtfast.data.prompt import Prompt
from vtfast.model.policy import Policy
from vtfast.rollout.engine import RolloutEngine
from vtfast.rollout.sampling import Completion, Sampling


class Engine(Protocol):
    """What the trainer and evaluations ask of an engine: completions [prompt][sample]."""

    should_cancel: Callable[[], object] | None
    """Says whether a rollout is to end at once, with RolloutCancelled; an engine need not ask."""
    last_timings: dict[str, float]
    """Of the last call, by part: "prefill" and "decode"; empty where the engine does not tell them apart."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        num_generations: int = 1,
        sampling: Sampling = ...,
        seed: int = 0,
        progress: bool = False,
    ) -> list[list[Completion]]: ...


def build_engine(config: RunConfig, policy: Policy, processor: Processor, path: str, images_a_prompt: int) -> Engine:
    """Ours, or vLLM with `--use_vllm`. `path`: the checkpoint. Raises UserError where the engine cannot be had."""
    if not config.use_vllm:
        return RolloutEngine(
            policy,
            processor,
            cache_tokens=config.rollout_cache_tokens,
            max_rows=config.rollout_max_rows,
            keep_cache=config.rollout_keep_cache,
            attention=config.rollout_attention,
        )
    from vtfast.rollout.vllm import VLLMEngine

    return VLLMEngine(
        policy,
        processor,
        path,
        max_model_len=config.max_prompt_length + config.max_completion_length,
        gpu_memory_utilization=config.vllm_gpu_memory_utilization,
        enable_sleep_mode=config.vllm_enable_sleep_mode,
        images_a_prompt=max(1, images_a_prompt),
    )
