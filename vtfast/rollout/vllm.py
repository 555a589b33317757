"""vLLM behind the engine's interface, for models and clusters that RolloutEngine does not serve.

Never run on a GPU: tested against a stand-in with vLLM's signatures only.

Colocated: every rank has its own vLLM on its GPU, asleep between rollouts so that the update has the memory. The
trainer's weights are copied into it before every rollout (level-2 sleep drops vLLM's own), LoRA adapters merged.

    --use_vllm true --vllm_gpu_memory_utilization 0.3

Differences from `RolloutEngine`: weights exist twice while vLLM is awake; its kernels round differently, which the
log-prob mismatch (`sampler_drift`) shows and `--vllm_importance_sampling_correction` corrects; and its draws depend on
its own random numbers, so a run cannot be resumed bit for bit with the other engine.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vtfast.data.processor import Processor
from vtfast.data.prompt import Prompt
from vtfast.distributed import watchdog
from vtfast.model.policy import Policy
from vtfast.rollout.sampling_params import Completion, Sampling, row_key
from vtfast.utils.errors import UserError, user_error

VERSION = "0.33"
"""The vLLM that this was written against."""


def check_installed() -> None:
    """Raise UserError if vllm is not installed. Does not import it, which takes long and may take the device."""
    if sys.modules.get("vllm") is None and importlib.util.find_spec("vllm") is None:
        raise UserError("not installed (pip install vllm); or leave the flag out")


class VLLMEngine:
    """`generate` as in `RolloutEngine`."""

    def __init__(
        self,
        policy: Policy,
        processor: Processor,
        path: str,
        *,
        max_model_len: int,
        gpu_memory_utilization: float = 0.3,
        enable_sleep_mode: bool = True,
        images_per_prompt: int = 1,
    ) -> None:
        """`path`: checkpoint folder or hub id that vLLM reads its configuration from. `max_model_len`: tokens of prompt
        and completion."""
        with user_error("--use_vllm: vllm cannot be imported; pip install vllm, or leave the flag out"):
            from vllm import LLM, SamplingParams

        _set_rank_of_single_process()
        self.policy, self.processor = policy, processor
        self.should_cancel: Callable[[], object] | None = None  # never called
        self.last_timings: dict[str, float] = {}  # vLLM mixes prefill and decode
        self.sampling_params, self.sleeps = SamplingParams, enable_sleep_mode
        images: dict[str, Any] = {}
        if processor.pixel_limits is not None:
            low, high = processor.pixel_limits
            images["limit_mm_per_prompt"] = {"image": images_per_prompt, "video": 0}  # else it profiles videos, too
            images["mm_processor_kwargs"] = {"min_pixels": low, "max_pixels": high}
        self.llm = LLM(
            model=path,
            dtype=str(policy.head.dtype).removeprefix("torch."),
            tensor_parallel_size=1,
            gpu_memory_utilization=gpu_memory_utilization,
            max_model_len=max_model_len,
            enable_sleep_mode=enable_sleep_mode,
            enable_prefix_caching=True,  # the G samples of a prompt read its pages once
            **images,
            distributed_executor_backend="external_launcher",  # ranks are DeepSpeed's
            logprobs_mode="processed_logprobs",  # of the distribution that was drawn from
            seed=0,
        )
        with user_error(f"--use_vllm: vllm {VERSION} or newer is needed"):
            self.resets: tuple[Callable[[], object], ...] = (
                self.llm.reset_prefix_cache,
                self.llm.reset_mm_cache,
                self.llm.llm_engine.reset_encoder_cache,
            )
        if enable_sleep_mode:
            self.llm.sleep(level=2)

    def stop_keeping_cache(self) -> bool:
        """vLLM frees its memory between calls if it sleeps (`--vllm_enable_sleep_mode`), or never."""
        return False

    @torch.no_grad()
    @watchdog.no_progress_expected("vLLM's rollout")
    def generate(
        self,
        prompts: Sequence[Prompt],
        num_generations: int = 1,
        sampling: Sampling | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> list[list[Completion]]:
        """Return `num_generations` completions of each prompt: `result[p][g]`.

        Raises UserError if vLLM's tokens of a prompt differ from the trainer's.
        """
        if not prompts:
            return []
        sampling = sampling or Sampling()
        try:
            if self.sleeps:
                self.llm.wake_up(tags=["weights"])
            self.push_weights()
            if self.sleeps:
                self.llm.wake_up(tags=["kv_cache"])
            outputs = self.llm.generate(
                [self._request(prompt) for prompt in prompts],
                sampling_params=[
                    self._sampling_params(sampling, num_generations, row_key(prompt.key, seed) >> 1)
                    for prompt in prompts
                ],
                use_tqdm=progress,
            )
        finally:
            if self.sleeps:
                self.llm.sleep(level=2)
        return [_completions(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]

    def push_weights(self) -> None:
        """Load the trainer's weights, one tensor at a time, and drop what was computed with the old ones: prefixes, and
        images, which vLLM knows by their pixels alone."""
        model = self.llm.llm_engine.model_executor.driver_worker.model_runner.model
        for weight in checkpoint_weights(self.policy.module):
            model.load_weights([weight])
        for reset in self.resets:
            reset()

    def _request(self, prompt: Prompt) -> dict[str, Any]:
        """Token ids with one placeholder per image, which vLLM repeats itself, and the resized images."""
        mask = prompt.image_mask
        if mask is None or prompt.grid is None:
            return {"prompt_token_ids": prompt.ids.tolist()}
        repeated = torch.zeros_like(mask)
        repeated[1:] = mask[1:] & mask[:-1]
        images = [self.processor.resize(image) for image in prompt.images]
        data = {"image": images if len(images) > 1 else images[0]}
        return {"prompt_token_ids": prompt.ids[~repeated].tolist(), "multi_modal_data": data}

    def _sampling_params(self, sampling: Sampling, n: int, seed: int) -> Any:
        return self.sampling_params(
            n=n,
            temperature=0.0 if sampling.greedy else sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            max_tokens=sampling.max_new_tokens,
            min_tokens=sampling.min_new_tokens,
            stop=list(sampling.stop) or None,
            include_stop_str_in_output=True,
            stop_token_ids=list(self.policy.eos_ids),
            ignore_eos=True,  # the end tokens are the checkpoint's generation_config's, as in RolloutEngine
            logprobs=0,  # of the drawn token only
            seed=seed,
        )


def _completions(prompt: Prompt, output: Any) -> list[Completion]:
    """Return the completions of vLLM's RequestOutput."""
    if list(output.prompt_token_ids) != prompt.ids.tolist():
        raise UserError(
            f"vLLM made {len(output.prompt_token_ids)} tokens of a prompt of {len(prompt.ids)};"
            " its image processor does not follow --min_pixels and --max_pixels"
        )
    return [
        Completion(
            list(completion.token_ids),
            [
                logprobs[token].logprob
                for token, logprobs in zip(completion.token_ids, completion.logprobs, strict=True)
            ],
            "length" if completion.finish_reason == "length" else "stop",
        )
        for completion in output.outputs
    ]


def _set_rank_of_single_process() -> None:
    """Set the environment variables that vLLM expects from a launcher."""
    if "RANK" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    single = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    for name, value in single.items():
        os.environ.setdefault(name, str(value))


def checkpoint_weights(module: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name in a checkpoint, weight) of all weights, LoRA adapters merged; the module stays as it is."""
    adapted: dict[str, Any] = {n: layer for n, layer in module.named_modules() if hasattr(layer, "get_delta_weight")}
    for name, parameter in module.named_parameters():
        if ".lora_" in name:
            continue
        weight: Tensor = parameter
        owner, _, kind = name.rpartition(".base_layer.")
        if owner in adapted:
            layer = adapted[owner]
            if kind == "weight":
                weight = weight + sum(layer.get_delta_weight(a) for a in layer.active_adapters)
            name = f"{owner}.{kind}"
        yield name, weight.detach()
