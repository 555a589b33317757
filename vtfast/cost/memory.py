"""How much memory a rank of a run takes, from settings and shapes alone. An estimate: what the engine, the rollout and
the loss allocate is counted as they do it; what PyTorch's allocator, NCCL and CUDA graphs add is a flat guess.

Everything is taken at its limit: each prompt as long as `max_prompt_length`, each completion as long as
`max_completion_length`, each prompt with one image of `max_pixels` (or as much of it as the prompt holds).

All sizes in bytes. P tokens of a prompt, C of a completion, G completions a prompt, T tokens of a packed row, N scored
tokens of it, D hidden size, I of the MLP, H d and K d width of queries and of keys, V vocabulary, E width of the vision
tower, e bytes of a number.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from vtfast_kernels.logit_rows import chunk_rows

from vtfast.config import RunConfig
from vtfast.config.rules import PIXELS_A_TOKEN
from vtfast.evaluate.held_out import BATCH as HELD_OUT_BATCH
from vtfast.model.policy import Policy
from vtfast.rollout.cache import pages_needed
from vtfast.rollout.engine import CACHE_SHARE, PAGE_SIZE
from vtfast.rollout.scheduler import PREFILL_TOKENS
from vtfast.rollout.workspace import cache_shape

BUCKET = 500_000_000
"""Numbers in a gradient bucket: DeepSpeed's default `reduce_bucket_size`."""
OVERHEAD = {"cpu": 0, "cuda": 2_000_000_000}
"""CUDA's context, NCCL's buffers, CUDA graphs, holes in the allocator's blocks. A guess."""
PATCHES_A_TOKEN = 4


@dataclass(frozen=True)
class Workload:
    """What one rank works on at a time, everything at its limit."""

    prompts: int
    """Of a rank in a step."""
    group: int
    prompt: int
    """P"""
    completion: int
    """C"""
    image: int
    """Tokens of a prompt that are its image."""
    tokens: int
    """T, of the longest pass."""
    passes: int

    @property
    def in_pass(self) -> int:
        """Prompts of a pass, if their completions fill it."""
        return max(1, -(-self.tokens // (self.prompt + self.group * self.completion)))

    @property
    def scored(self) -> int:
        """N"""
        return max(self.completion, self.tokens - self.in_pass * self.prompt)

    @property
    def images_in_pass(self) -> int:
        """Images of a pass in which completions are short, so that it holds more prompts."""
        return min(self.prompts, max(1, self.tokens // (self.prompt + self.group)))

    @property
    def key_rows(self) -> int:
        """Rows of keys that a pass attends to: a prompt's own, and for each completion the prompt's and its own."""
        completions = self.scored // self.completion
        return self.in_pass * self.prompt + completions * (self.prompt + self.completion)


def workload_of(config: RunConfig, has_images: bool) -> Workload:
    """A step is cut into rows of at most `tokens_per_micro_batch` tokens; a prompt with one completion always fits."""
    group = getattr(config, "num_generations", 1)
    P, C, prompts = config.max_prompt_length, config.max_completion_length, config.prompts_per_rank
    step = prompts * (P + group * C)
    tokens = max(P + C, min(config.tokens_per_micro_batch, step))
    image = min(P, config.max_pixels // PIXELS_A_TOKEN) if has_images else 0
    return Workload(prompts, group, P, C, image, tokens, passes=-(-step // tokens))


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of the model, by what trains or freezes them together."""

    name: str
    parameters: int
    trained: int
    bytes: int
    trained_bytes: int


def count_parameters(policy: Policy) -> list[ParameterCount]:
    """Vision, merger, language, embeddings (with the head; tied weights once), and LoRA's adapters."""
    visual = None if policy.vision is None else policy.vision.module
    homes: dict[str, list[nn.Module]] = (
        {} if visual is None else {"vision": [visual.patch_embed, visual.blocks], "merger": [visual.merger]}
    )
    embeddings = [policy.language_model.embed_tokens, policy.module.lm_head]
    homes["embeddings"] = embeddings
    of = {id(p): name for name, home in homes.items() for m in home for p in m.parameters()}
    counts: dict[str, list[int]] = {}
    for name, parameter in policy.module.named_parameters():
        part = "adapters" if "lora_" in name else of.get(id(parameter), "language")
        size, trained = parameter.numel(), parameter.requires_grad
        width = parameter.element_size()
        row = (size, size * trained, size * width, size * width * trained)
        counts[part] = [a + b for a, b in zip(counts.get(part, [0] * 4), row, strict=True)]
    order = ("vision", "merger", "language", "embeddings", "adapters")
    return [ParameterCount(name, *counts[name]) for name in order if name in counts]


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank, by what they are for."""

    weights: int
    optimizer: int
    reference: int
    gradients: int
    activations: int
    vision_activations: int
    loss: int
    cache: int
    joined: int
    prefill: int
    vllm: int
    overhead: int
    keeps_cache: bool
    """Between rollouts; vLLM's memory, if it does not sleep then."""

    @property
    def standing(self) -> int:
        """Held through all of a step."""
        kept = self.cache + self.joined + self.vllm if self.keeps_cache else 0
        return self.weights + self.optimizer + self.reference + kept + self.overhead

    @property
    def update(self) -> int:
        """Beside that, in an update."""
        return self.gradients + self.activations + self.vision_activations + self.loss

    @property
    def rollout(self) -> int:
        """Beside that, while answers are sampled."""
        fresh = 0 if self.keeps_cache else self.cache + self.joined + self.vllm
        return fresh + self.prefill

    @property
    def peak(self) -> int:
        return self.standing + max(self.update, self.rollout)


def estimate_memory(
    policy: Policy, config: RunConfig, ranks: int, kind: str, device_bytes: int | None
) -> MemoryEstimate:
    """`policy`: a blueprint. `kind`: cpu or cuda. `device_bytes`: of the device, which caps the cache."""
    load = workload_of(config, policy.vision is not None)
    parts = count_parameters(policy)
    weights = sum(part.bytes for part in parts)
    trained = sum(part.trained for part in parts)
    optimizer = optimizer_bytes(trained, ranks)
    reference = 0
    if getattr(config, "beta", 0) > 0 and not config.use_peft and not config.offload_reference:
        reference = sum(part.trained_bytes for part in parts)  # frozen weights are shared
    room = None
    if device_bytes is not None:  # Adam's moments come with the first step, behind the first rollout
        taken = weights + optimizer // 3 + reference + OVERHEAD[kind]
        room = int(CACHE_SHARE[kind] * max(0, device_bytes - taken))
    vllm = 0
    if config.use_vllm:
        vllm = int(config.vllm_gpu_memory_utilization * (device_bytes or 0))
    return MemoryEstimate(
        weights=weights,
        optimizer=optimizer,
        reference=reference,
        gradients=gradient_bytes(parts, ranks, kind),
        activations=activation_bytes(policy, config, load, kind),
        vision_activations=vision_activation_bytes(policy, config, load, kind),
        loss=loss_bytes(policy, load.scored, kind),
        cache=0 if config.use_vllm else cache_bytes(policy, config, load, kind, room),
        joined=0 if config.use_vllm else fused_weight_bytes(policy),
        prefill=0 if config.use_vllm else prefill_bytes(policy, load),
        vllm=vllm,
        overhead=OVERHEAD[kind],
        keeps_cache=not config.vllm_enable_sleep_mode if config.use_vllm else config.rollout_keep_cache,
    )


def optimizer_bytes(trained: int, ranks: int) -> int:
    """This rank's share of an fp32 copy of the trained weights and of Adam's two moments: 12 bytes a weight.

    DeepSpeed's stage_1_and_2.py clones its partition whatever the weights' dtype, so fp32 weights have a copy too."""
    return -(-trained // ranks) * 12


def gradient_bytes(parts: list[ParameterCount], ranks: int, kind: str) -> int:
    """This rank's share of the gradients, summed in fp32 over the passes, and the buckets in which they are reduced.

    stage_1_and_2.py makes a bucket of `reduce_bucket_size` numbers of the weights' dtype, and a second one with
    `overlap_comm`, which is on with CUDA. There they are taken in full however small the model is; on the CPU pages
    that nothing touches take no memory."""
    trained = sum(part.trained for part in parts)
    width = max((p.trained_bytes // p.trained for p in parts if p.trained), default=4)
    bucket = 2 * BUCKET if kind == "cuda" else min(BUCKET, trained)
    return -(-trained // ranks) * 4 + bucket * width


def activation_bytes(policy: Policy, config: RunConfig, load: Workload, kind: str) -> int:
    """What the language model keeps for its backward, and one layer's gradients. The embedding and the last norm keep
    3 D a token.

    With checkpointing every layer keeps its input, and one at a time is run again."""
    layers = policy.language_model.layers
    width = policy.head.element_size()
    states = load.tokens * policy.head.shape[1] * width
    layer = int(load.tokens * saved_per_token(policy, config, load, kind)) * width
    if config.gradient_checkpointing:
        return (len(layers) + 3) * states + 2 * layer
    return 3 * states + (len(layers) + 1) * layer


def saved_per_token(policy: Policy, config: RunConfig, load: Workload, kind: str) -> float:
    """Numbers that a decoder layer keeps for the backward, for each token of the row: inputs of its matmuls, norms and
    attention.

    Liger's:         norms 4 D (input, output, twice), MLP 3 I (gate, up, their product)
    Hugging Face's:  norms 6 D (the normalised input as well; 8 D from half precision, in fp32), MLP 4 I (silu(gate))
    flash kernels:   queries and output 2 H d; keys and values 2 K d for each row of keys, since prompts are gathered
                     once for every completion
    PyTorch's SDPA:  the output once more (rows are padded there), and a mask of every completion's tokens x its keys
    """
    text = policy.language_model.config
    D, inner = text.hidden_size, text.intermediate_size
    d = getattr(text, "head_dim", None) or D // text.num_attention_heads
    queries, keys = text.num_attention_heads * d, text.num_key_value_heads * d
    fused = kind == "cuda" and config.use_liger_kernel
    half = policy.head.element_size() == 2
    numbers = (4 * D + 3 * inner) if fused else ((8 if half else 6) * D + 4 * inner)
    numbers += 2 * queries + 2 * keys * load.key_rows / load.tokens
    if hasattr(policy.language_model.layers[0].self_attn, "q_norm"):
        numbers += 2 * (queries + keys)
    if uses_sdpa(config, kind):
        pairs = load.scored * (load.prompt + load.completion)
        numbers += queries + pairs / load.tokens
    return numbers


def uses_sdpa(config: RunConfig, kind: str) -> bool:
    return kind == "cpu" or config.attn_implementation == "sdpa"


def vision_activation_bytes(policy: Policy, config: RunConfig, load: Workload, kind: str) -> int:
    """What the vision tower keeps for the backward of a pass's images, one block's gradients, and the pixels.

    A frozen tower keeps its last output alone, of all images of the step (`model.ImageMemory`). The merger, trained or
    not, keeps 4 E a patch, unless nothing in front of it or in it is trained."""
    visual = None if policy.vision is None else policy.vision.module
    if visual is None:
        return 0
    patches = load.images_in_pass * load.image * PATCHES_A_TOKEN
    weight = visual.patch_embed.proj.weight
    E, width = weight.shape[0], weight.element_size()
    merger = patches * 4 * E * width * any(p.requires_grad for p in visual.parameters())
    if policy.vision_is_frozen:
        return merger + load.prompts * load.image * PATCHES_A_TOKEN * E * width
    pixels = patches * weight[0].numel() * (4 + width)
    block = patches * saved_per_patch(policy, config, kind) * width
    if config.gradient_checkpointing:
        return len(visual.blocks) * patches * E * width + 2 * block + merger + pixels
    return (len(visual.blocks) + 1) * block + merger + pixels


def saved_per_patch(policy: Policy, config: RunConfig, kind: str) -> int:
    """Numbers that a block of the tower keeps for each patch: norms 4 E, attention 4 E (5 E with PyTorch's SDPA), MLP.

    Qwen2-VL's MLP keeps 3 of its width (QuickGELU's input, gate and output); Qwen2.5-VL's is the language model's, and
    its norms keep what those do."""
    E, mlp = policy.vision.module.patch_embed.proj.weight.shape[0], policy.vision.module.blocks[0].mlp
    fused = kind == "cuda" and config.use_liger_kernel
    attention = (5 if uses_sdpa(config, kind) else 4) * E
    if hasattr(mlp, "gate_proj"):
        inner = mlp.gate_proj.out_features
        return attention + (4 * E + 3 * inner if fused else 6 * E + 4 * inner)
    return attention + 4 * E + 3 * mlp.fc1.out_features


def loss_bytes(policy: Policy, scored: int, kind: str) -> int:
    """`linear_grpo_loss`: a chunk of logits at a time, the scored states with their gradient, and the head's gradient
    in fp32, handed on in its dtype.

    On the CPU a chunk has two fp32 buffers, and a head of half precision is copied to fp32."""
    head = policy.head
    V, D = head.shape
    width = head.element_size()
    rows = chunk_rows(scored, V, width, kind)
    chunk = 2 * rows * V * 4 if kind == "cpu" else rows * V * width
    copied = 4 * V * D if kind == "cpu" and width < 4 else 0
    gradient = V * D * (4 + width) if head.requires_grad else 0
    return chunk + copied + gradient + 3 * scored * D * width


def cache_bytes(policy: Policy, config: RunConfig, load: Workload, kind: str, room: int | None) -> int:
    """The rollout's key-value pool (`RolloutEngine._required_size`): for each group in flight the prompt's full pages
    once and every row's own; for held-out questions the same with one row. At most `room`, or `rollout_cache_tokens`."""
    page = PAGE_SIZE[kind]
    layers, heads, head_dim = cache_shape(policy)
    a_page = 2 * layers * page * heads * head_dim * policy.head.element_size()
    if config.rollout_cache_tokens is not None:
        return (-(-config.rollout_cache_tokens // page) + 1) * a_page
    shared, own = pages_needed(page, load.prompt, load.completion)
    in_flight = min(load.prompts, max(1, config.rollout_max_rows // load.group))
    pages = 0
    if hasattr(config, "num_generations"):  # a supervised run answers held-out questions alone
        pages = in_flight * (shared + load.group * own)
    if config.eval_data is not None:
        pages = max(pages, min(HELD_OUT_BATCH, config.eval_samples) * (shared + own))
    wanted = (pages + 1) * a_page if pages else 0
    return wanted if room is None else min(wanted, max(room, 2 * a_page))


def fused_weight_bytes(policy: Policy) -> int:
    """Copies of the weights that a decode step wants side by side: q, k and v, and gate and up. Layers with adapters
    have none (`rollout.decode`)."""
    total = 0
    for layer in policy.language_model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for joined in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
            if all(type(module) is nn.Linear for module in joined):
                total += sum(p.numel() * p.element_size() for m in joined for p in m.parameters())
    return total


def prefill_bytes(policy: Policy, load: Workload) -> int:
    """A layer's tensors while prompts are read, at most PREFILL_TOKENS at once, and a block's for their images."""
    text = policy.language_model.config
    prompts = max(1, min(load.prompts, PREFILL_TOKENS // load.prompt))
    width = policy.head.element_size()
    language = prompts * load.prompt * (4 * text.hidden_size + 3 * text.intermediate_size) * width
    if policy.vision is None:
        return language
    patch = policy.vision.module.patch_embed.proj.weight
    vision = prompts * load.image * PATCHES_A_TOKEN * (patch[0].numel() + 16 * patch.shape[0]) * width
    return max(language, vision)
