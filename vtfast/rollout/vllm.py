"""vLLM behind the engine's interface, for models and clusters that outgrow ours.

Colocated: every rank has a vLLM of its own on its GPU, asleep between rollouts so that the update has the memory. The
trainer's weights are copied into it before every rollout (level-2 sleep drops vLLM's own), LoRA adapters merged.

    --use_vllm true --vllm_gpu_memory_utilization 0.3

What differs from `RolloutEngine`: weights exist twice while vLLM is awake; its kernels round differently, which
`sampler_drift` shows and `--vllm_importance_sampling_correction` corrects; and its draws depend on its own random
numbers, so that a run cannot be continued with the other engine to the bit.

vllm is imported by the constructor and nowhere else. Checked against vLLM's signatures by a stand-in, not on a GPU yet.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor

from vtfast.data.processor import Processor
from vtfast.data.prompt import Prompt
from vtfast.distributed import watchdog
from vtfast.model.policy import Policy
from vtfast.rollout.sampling import Completion, Sampling
from vtfast.rollout.scheduler import row_key
from vtfast.utils.errors import UserError


def check_installed() -> None:
    """Raises UserError where there is no vllm. Does not import it, which takes long and may take the device."""
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
        images_a_prompt: int = 1,
    ) -> None:
        """`path`: checkpoint folder or hub id that vLLM reads its configuration from. `max_model_len`: prompt and
        completion. Raises UserError where vllm is not installed."""
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise UserError(
                f"--use_vllm: vllm cannot be imported ({error}); pip install vllm, or leave the flag out"
            ) from None
        _name_the_only_rank()
        self.policy, self.processor = policy, processor
        self.should_cancel: Callable[[], object] | None = None  # never asked
        self.last_timings: dict[str, float] = {}  # prefill and decode are mixed in vLLM
        self.sampling_params, self.sleeps = SamplingParams, enable_sleep_mode
        limits = processor.pixel_limits
        images = (
            {}
            if limits is None
            else {
                "limit_mm_per_prompt": {"image": images_a_prompt},
                "mm_processor_kwargs": {"min_pixels": limits[0], "max_pixels": limits[1]},
            }
        )
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
            logprobs_mode="processed_logprobs",  # those of the distribution that was drawn from
            seed=0,
        )
        if enable_sleep_mode:
            self.llm.sleep(level=2)

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
        """`num_generations` completions of each prompt: `result[p][g]`. Raises UserError when vLLM made other tokens of
        a prompt than the trainer would."""
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
                    self._parameters(sampling, num_generations, row_key(prompt.key, seed) >> 1) for prompt in prompts
                ],
                use_tqdm=progress,
            )
        finally:
            if self.sleeps:
                self.llm.sleep(level=2)
        return [self._completions(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]

    def push_weights(self) -> None:
        """The trainer's weights, one tensor at a time; cached prefixes were made with the old ones."""
        model = self.llm.llm_engine.model_executor.driver_worker.model_runner.model
        for weight in checkpoint_weights(self.policy.module):
            model.load_weights([weight])
        self.llm.reset_prefix_cache()

    def _request(self, prompt: Prompt) -> dict:
        """Token ids with one placeholder an image, which vLLM repeats itself, and the resized images."""
        ids, mask = prompt.ids, prompt.image_mask
        if prompt.grid is None:
            return {"prompt_token_ids": ids.tolist()}
        again = torch.zeros_like(mask)
        again[1:] = mask[1:] & mask[:-1]
        images: list[Image.Image] = [self.processor.resize(image) for image in prompt.images]
        data = {"image": images if len(images) > 1 else images[0]}
        return {"prompt_token_ids": ids[~again].tolist(), "multi_modal_data": data}

    def _parameters(self, sampling: Sampling, n: int, seed: int):
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
            logprobs=0,  # of the drawn token alone
            seed=seed,
        )

    def _completions(self, prompt: Prompt, output) -> list[Completion]:
        if list(output.prompt_token_ids) != prompt.ids.tolist():
            raise UserError(
                f"vLLM made {len(output.prompt_token_ids)} tokens of a prompt of {len(prompt.ids)};"
                " its image processor does not follow --min_pixels and --max_pixels"
            )
        return [
            Completion(
                list(answer.token_ids),
                [at[token].logprob for token, at in zip(answer.token_ids, answer.logprobs, strict=True)],
                "length" if answer.finish_reason == "length" else "stop",
            )
            for answer in output.outputs
        ]


def _name_the_only_rank() -> None:
    """vLLM reads from the environment what a launcher would have put there."""
    if "RANK" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    for name, value in alone.items():
        os.environ.setdefault(name, str(value))


def checkpoint_weights(module: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name in a checkpoint, weight) of everything, LoRA adapters added to the weights beside them; nothing changes."""
    adapted = {name: layer for name, layer in module.named_modules() if hasattr(layer, "get_delta_weight")}
    for name, weight in module.named_parameters():
        if ".lora_" in name:
            continue
        owner, _, kind = name.rpartition(".base_layer.")
        if owner in adapted:
            layer = adapted[owner]
            if kind == "weight":
                weight = weight + sum(layer.get_delta_weight(a) for a in layer.active_adapters)
            name = f"{owner}.{kind}"
        yield name, weight.detach()
