"""Bytes that a micro-batch's forward keeps for its backward: the decoder's layers, the vision encoder and the loss.

Sizes are those of the kernels that a run uses: Liger's or Hugging Face's layers, flash attention or PyTorch's SDPA.

P tokens of a prompt, C of a completion, T tokens of a packed row, N scored tokens of it, D hidden size, I of the MLP,
H d and K d width of queries and of keys, V vocabulary, E width of the vision encoder.
`device_type`: cpu or cuda.
"""

from __future__ import annotations

from vtfast_kernels.chunks import chunk_rows

from vtfast.config import RunConfig
from vtfast.cost.largest_step import PATCHES_PER_TOKEN, Workload
from vtfast.model.policy import Policy
from vtfast.model.text_shape import text_shape


def activation_bytes(policy: Policy, config: RunConfig, load: Workload, device_type: str) -> int:
    """What the language model keeps for its backward, and one layer's gradients. The embedding and the last norm keep
    3 D per token.

    With checkpointing every layer keeps its input, and one layer at a time is recomputed."""
    layers = text_shape(policy.module.config).layers
    itemsize = policy.head.element_size()
    states = load.tokens * policy.head.shape[1] * itemsize
    layer = int(load.tokens * saved_per_token(policy, config, load, device_type)) * itemsize
    if config.gradient_checkpointing:
        return (layers + 3) * states + 2 * layer
    return 3 * states + (layers + 1) * layer


def saved_per_token(policy: Policy, config: RunConfig, load: Workload, device_type: str) -> float:
    """Numbers that a decoder layer keeps for the backward, per token of the row: inputs of its matmuls, norms and
    attention.

    Liger's:         norms 4 D (input, output, twice), MLP 3 I (gate, up, their product)
    Hugging Face's:  norms 6 D (the normalised input as well; 8 D from half precision, in fp32), MLP 4 I (silu(gate))
    flash kernels:   queries and output 2 H d; keys and values 2 K d for each row of keys, since prompts are gathered
                     once for every completion
    PyTorch's SDPA:  the output once more (rows are padded there), and a mask of every completion's tokens x its keys
    """
    shape = text_shape(policy.module.config)
    D, inner = shape.hidden_size, shape.intermediate_size
    half = policy.head.element_size() == 2
    numbers: float = (4 * D + 3 * inner) if _fused(config, device_type) else ((8 if half else 6) * D + 4 * inner)
    numbers += 2 * shape.query_width + 2 * shape.kv_width * load.key_rows / load.tokens
    if hasattr(policy.language_model.layers[0].self_attn, "q_norm"):
        numbers += 2 * (shape.query_width + shape.kv_width)
    if uses_sdpa(config, device_type):
        pairs = load.scored * (load.prompt + load.completion)
        numbers += shape.query_width + pairs / load.tokens
    return numbers


def _fused(config: RunConfig, device_type: str) -> bool:
    return device_type == "cuda" and config.use_liger_kernel


def uses_sdpa(config: RunConfig, device_type: str) -> bool:
    return device_type == "cpu" or config.attn_implementation == "sdpa"


def vision_activation_bytes(policy: Policy, config: RunConfig, load: Workload, device_type: str) -> int:
    """What the vision encoder keeps for the backward of a micro-batch's images, one block's gradients, and the pixels.

    A frozen encoder keeps only its output, of all images of the step (`FeatureCache`). The merger, trained or not,
    keeps 4 E per patch, unless neither it nor the encoder is trained."""
    if policy.vision is None:
        return 0
    visual = policy.vision.module
    weight = visual.patch_embed.proj.weight
    E, itemsize = weight.shape[0], weight.element_size()
    patches = load.images_per_micro_batch * load.image * PATCHES_PER_TOKEN
    merger = patches * 4 * E * itemsize * any(p.requires_grad for p in visual.parameters())
    if policy.vision_is_frozen:
        return merger + load.prompts * load.image * PATCHES_PER_TOKEN * E * itemsize
    pixels = patches * weight[0].numel() * (4 + itemsize)
    block = patches * saved_per_patch(policy, config, device_type) * itemsize
    if config.gradient_checkpointing:
        return len(visual.blocks) * patches * E * itemsize + 2 * block + merger + pixels
    return (len(visual.blocks) + 1) * block + merger + pixels


def saved_per_patch(policy: Policy, config: RunConfig, device_type: str) -> int:
    """Numbers that a block of the vision encoder keeps per patch: norms 4 E, attention 4 E (5 E with PyTorch's SDPA),
    MLP.

    Qwen2-VL's MLP keeps 3 of its width (QuickGELU's input, gate and output); Qwen2.5-VL's is the language model's, and
    its norms keep what those do."""
    assert policy.vision is not None
    E, mlp = policy.vision.module.patch_embed.proj.weight.shape[0], policy.vision.module.blocks[0].mlp
    attention = (5 if uses_sdpa(config, device_type) else 4) * E
    if hasattr(mlp, "gate_proj"):
        inner = mlp.gate_proj.out_features
        return attention + (4 * E + 3 * inner if _fused(config, device_type) else 6 * E + 4 * inner)
    return attention + 4 * E + 3 * mlp.fc1.out_features


def loss_bytes(policy: Policy, scored: int, device_type: str) -> int:
    """`linear_grpo_loss`: a chunk of logits at a time, the scored states with their gradient, and the head's gradient
    in fp32, handed on in its dtype.

    On the CPU a chunk has two fp32 buffers, and a head of half precision is copied to fp32."""
    V, D = policy.head.shape
    itemsize = policy.head.element_size()
    on_cpu = device_type == "cpu"
    rows = chunk_rows(scored, V, D, itemsize, device_type)
    chunk = 2 * rows * V * 4 if on_cpu else rows * V * itemsize
    fp32_copy = 4 * V * D if on_cpu and itemsize < 4 else 0
    gradient = V * D * (4 + itemsize) if policy.head.requires_grad else 0
    return chunk + fp32_copy + gradient + 3 * scored * D * itemsize
