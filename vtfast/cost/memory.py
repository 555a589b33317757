"""How much memory a rank of a run takes, from settings and shapes alone, at the largest step that the settings allow
(`largest_step.py`).

An estimate: what the engine, the rollout and the loss allocate is counted as they do it; what PyTorch's allocator, NCCL
and CUDA graphs add is a flat guess. All sizes are in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from vtfast.config import Config, RunConfig
from vtfast.cost.activations import activation_bytes, loss_bytes, vision_activation_bytes
from vtfast.cost.largest_step import PATCHES_PER_TOKEN, Workload, workload_of
from vtfast.distributed.zero2 import REDUCE_BUCKET_SIZE
from vtfast.evaluate.held_out import BATCH as HELD_OUT_BATCH
from vtfast.model.policy import Policy
from vtfast.model.text_shape import text_shape
from vtfast.rollout.engine import PAGE_SIZE
from vtfast.rollout.kv_cache import pages_needed
from vtfast.rollout.scheduler import PREFILL_TOKENS

SPARE = 0.1
"""Share of the device that the cache leaves free, because the rest is an estimate."""
OVERHEAD = {"cpu": 0, "cuda": 2_000_000_000}
"""CUDA's context, NCCL's buffers, CUDA graphs, holes in the allocator's blocks. A guess."""
PARTS = ("vision", "merger", "language", "embeddings", "adapters")


@dataclass
class ParameterCount:
    """Parameters of one of PARTS, which are frozen or trained together."""

    name: str
    parameters: int = 0
    trained: int = 0
    bytes: int = 0
    trained_bytes: int = 0


def count_parameters(policy: Policy) -> list[ParameterCount]:
    """Vision, merger, language, embeddings (with the head; tied weights once), and LoRA's adapters."""
    members: dict[str, list[nn.Module]] = {"embeddings": [policy.language_model.embed_tokens, policy.module.lm_head]}
    if policy.vision is not None:
        visual = policy.vision.module
        members |= {"vision": [visual.patch_embed, visual.blocks], "merger": [visual.merger]}
    part_of = {id(p): name for name, modules in members.items() for m in modules for p in m.parameters()}
    counts = {name: ParameterCount(name) for name in PARTS}
    for name, parameter in policy.module.named_parameters():
        count = counts["adapters" if "lora_" in name else part_of.get(id(parameter), "language")]
        count.parameters += parameter.numel()
        count.bytes += parameter.nbytes
        if parameter.requires_grad:
            count.trained += parameter.numel()
            count.trained_bytes += parameter.nbytes
    return [count for count in counts.values() if count.parameters]


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank, by purpose."""

    weights: int
    optimizer: int
    reference: int
    gradients: int
    activations: int
    vision_activations: int
    loss: int
    cache: int
    full_cache: int
    """The cache that all running rows need; `cache` is smaller if the device has no room for it."""
    fused_weights: int
    prefill: int
    vllm: int
    overhead: int
    keeps_cache: bool
    """Whether cache and fused weights stay allocated between rollouts; vLLM's memory, unless it sleeps then."""

    @property
    def standing(self) -> int:
        """Allocated throughout a step."""
        kept = self.sampling if self.keeps_cache else 0
        return self.weights + self.optimizer + self.reference + kept + self.overhead

    @property
    def sampling(self) -> int:
        return self.cache + self.fused_weights + self.vllm

    @property
    def update(self) -> int:
        """In an update, in addition to `standing`."""
        return self.gradients + self.activations + self.vision_activations + self.loss

    @property
    def rollout(self) -> int:
        """In a rollout, in addition to `standing`."""
        return self.prefill + (0 if self.keeps_cache else self.sampling)

    @property
    def peak(self) -> int:
        return self.standing + max(self.update, self.rollout)


def estimate_memory(
    policy: Policy, config: RunConfig, ranks: int, device_type: str, device_bytes: int
) -> MemoryEstimate:
    """`policy`: may be on the meta device. `device_type`: cpu or cuda. `device_bytes`: memory of the device. The
    rollout's cache gets at most what the rest leaves of it, but always room for one prompt with its completions."""
    load = workload_of(config, policy.vision is not None)
    parts = count_parameters(policy)
    reference = 0
    if isinstance(config, Config) and config.beta > 0 and not config.use_peft and not config.offload_reference:
        reference = sum(part.trained_bytes for part in parts)  # frozen weights are shared
    memory = MemoryEstimate(
        weights=sum(part.bytes for part in parts),
        optimizer=optimizer_bytes(sum(part.trained for part in parts), ranks),
        reference=reference,
        gradients=gradient_bytes(parts, ranks, device_type),
        activations=activation_bytes(policy, config, load, device_type),
        vision_activations=vision_activation_bytes(policy, config, load, device_type),
        loss=loss_bytes(policy, load.scored, device_type),
        cache=0,
        full_cache=0,
        fused_weights=0 if config.use_vllm else fused_weight_bytes(policy),
        prefill=0 if config.use_vllm else prefill_bytes(policy, load),
        vllm=int(config.vllm_gpu_memory_utilization * device_bytes) if config.use_vllm else 0,
        overhead=OVERHEAD[device_type],
        keeps_cache=not config.vllm_enable_sleep_mode if config.use_vllm else config.rollout_keep_cache,
    )
    if config.use_vllm:
        return memory
    others = memory.peak if memory.keeps_cache else memory.standing + memory.rollout
    full, least = cache_bytes(policy, config, load, device_type)
    cache = min(full, max(least, int((1 - SPARE) * device_bytes) - others))
    return replace(memory, cache=cache, full_cache=full)


def optimizer_bytes(trained: int, ranks: int) -> int:
    """This rank's share of an fp32 copy of the trained weights and of Adam's two moments: 12 bytes per weight.

    DeepSpeed's stage_1_and_2.py clones its partition whatever the weights' dtype, so fp32 weights have a copy too."""
    return -(-trained // ranks) * 12


def checkpoint_bytes(parts: list[ParameterCount], config: RunConfig) -> int:
    """Of a checkpoint on the disk: weights (with LoRA the adapters alone), their fp32 copy and Adam's two moments."""
    weights = sum(part.trained_bytes if config.use_peft else part.bytes for part in parts)
    return weights + optimizer_bytes(sum(part.trained for part in parts), ranks=1)


def gradient_bytes(parts: list[ParameterCount], ranks: int, device_type: str) -> int:
    """This rank's share of the gradients, summed in fp32 over the micro-batches, and the buckets in which they are
    reduced.

    stage_1_and_2.py makes a bucket of `reduce_bucket_size` numbers of the weights' dtype, and a second one with
    `overlap_comm`, which is on with CUDA. There they are allocated in full however small the model is; on the CPU,
    untouched pages take no memory. A bucket is flattened once more while it is reduced."""
    trained = sum(part.trained for part in parts)
    itemsize = max((p.trained_bytes // p.trained for p in parts if p.trained), default=4)
    bucket = 3 * REDUCE_BUCKET_SIZE if device_type == "cuda" else min(REDUCE_BUCKET_SIZE, trained)
    return -(-trained // ranks) * 4 + bucket * itemsize


def cache_bytes(policy: Policy, config: RunConfig, load: Workload, device_type: str) -> tuple[int, int]:
    """The rollout's key-value pool (`RolloutEngine`): for all running groups, and for one. A group has the prompt's
    full pages once and each row's own pages; for held-out questions it is one row. `rollout_cache_tokens` sets both."""
    page = PAGE_SIZE[device_type]
    page_bytes = page * text_shape(policy.module.config).kv_numbers * policy.head.element_size()
    if config.rollout_cache_tokens is not None:
        size = (-(-config.rollout_cache_tokens // page) + 1) * page_bytes
        return size, size
    shared, own = pages_needed(page, load.prompt, load.completion)
    groups = []  # (running groups, pages of one)
    if isinstance(config, Config):  # a supervised run generates for held-out questions only
        groups.append((min(load.prompts, max(1, config.rollout_max_rows // load.group)), shared + load.group * own))
    if config.eval_data is not None:
        groups.append((min(HELD_OUT_BATCH, config.eval_samples), shared + own))
    if not groups:
        return 0, 0
    full, least = max(running * pages for running, pages in groups), max(pages for _, pages in groups)
    return (full + 1) * page_bytes, (least + 1) * page_bytes


def fused_weight_bytes(policy: Policy) -> int:
    """Copies of the weights that a decode step reads as one matrix: q, k and v, and gate and up. Layers with adapters
    have none (`rollout.decode`)."""
    total = 0
    for layer in policy.language_model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for fused in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
            if all(type(module) is nn.Linear for module in fused):
                total += sum(p.nbytes for module in fused for p in module.parameters())
    return total


def prefill_bytes(policy: Policy, load: Workload) -> int:
    """A layer's tensors in the prefill of at most PREFILL_TOKENS tokens, or a vision block's for their images."""
    shape = text_shape(policy.module.config)
    prompts = max(1, min(load.prompts, PREFILL_TOKENS // load.prompt))
    itemsize = policy.head.element_size()
    language = prompts * load.prompt * (4 * shape.hidden_size + 3 * shape.intermediate_size) * itemsize
    if policy.vision is None:
        return language
    patch = policy.vision.module.patch_embed.proj.weight
    vision = prompts * load.image * PATCHES_PER_TOKEN * (patch[0].numel() + 16 * patch.shape[0]) * itemsize
    return max(language, vision)
