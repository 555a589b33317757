"""The engine that a run samples with: `RolloutEngine`, or vLLM with `--use_vllm`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from vtfast.config import RunConfig
from vtfast.data.processor import Processor
from vtfast.data.prompt import Prompt
from vtfast.model.policy import Policy
from vtfast.rollout.engine import RolloutEngine
from vtfast.rollout.sampling_params import Completion, Sampling


class Engine(Protocol):
    """What the trainer and evaluations need of an engine."""

    should_cancel: Callable[[], object] | None
    """A true result ends a rollout at once, with RolloutCancelled. An engine may ignore it."""
    last_timings: dict[str, float]
    """Seconds of the last call, by phase: "prefill" and "decode"; empty if the engine cannot tell them apart."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        num_generations: int = 1,
        sampling: Sampling = ...,
        seed: int = 0,
        progress: bool = False,
    ) -> list[list[Completion]]:
        """Return `num_generations` completions of each prompt: `result[p][g]`."""
        ...

    def stop_keeping_cache(self) -> bool:
        """Hold no memory between calls from now on; whether that freed any."""
        ...


def build_engine(
    config: RunConfig,
    policy: Policy,
    processor: Processor,
    path: str,
    images_per_prompt: int,
    cache_bytes: int | None = None,
) -> Engine:
    """Build the engine that the config asks for.

    `path`: checkpoint folder or hub id, which vLLM reads. `cache_bytes`: limit of `RolloutEngine`'s cache. Raises
    UserError if the engine cannot run here.
    """
    if not config.use_vllm:
        return RolloutEngine(
            policy,
            processor,
            cache_tokens=config.rollout_cache_tokens,
            cache_bytes=cache_bytes,
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
        # 0 turns images off in vLLM, which may then leave out the vision encoder; the weights pushed to it include it.
        images_per_prompt=max(1, images_per_prompt),
    )
