"""One registry of ops, inputs, costs and tolerances; the tests and the benches read it.

    from vtfast_kernels.cases import OPS, Shape
    op = OPS["linear_grpo_loss"]
    out = op.run(op.inputs(Shape(N=129, V=1000, D=64)), impl="torch")

Shapes: N scored tokens (or rows R, or rewards S), V vocabulary, D hidden (or intermediate, or head size).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .add_rms_norm import add_rms_norm
from .group_advantage import group_advantage
from .grpo_loss import GRPOLoss, grpo_loss
from .linear_grpo_loss import linear_grpo_loss
from .linear_logprob import linear_logprob
from .linear_sample import linear_sample
from .loss_types import LOSS_TYPES, TOKEN_LEVEL
from .page_table import Pages
from .paged_attention import paged_attention
from .rope_append import rope_append
from .silu_mul import silu_mul

FP32_TOLERANCE = 1e-5  # relative, against float64
TEMPERATURE = 0.9


@dataclass(frozen=True)
class Shape:
    N: int
    V: int = 1
    D: int = 1

    def __str__(self) -> str:
        return f"N{self.N}-V{self.V}-D{self.D}"


# Sizes on which kernels fail: none, one, one more than a tile, no power of two, the real vocabularies.
SMALL = [Shape(0, 123, 17), Shape(1, 123, 17), Shape(7, 1000, 64), Shape(129, 123, 100)]
VOCABULARIES = [Shape(7, 50257, 64), Shape(1, 151936, 17), Shape(7, 152064, 17)]
LARGE = [Shape(129, 50257, 100), Shape(7, 151936, 1536), Shape(129, 152064, 64)]
CPU_BENCH = [Shape(2048, 32768, 256), Shape(4096, 32768, 256)]
GPU_BENCH = [Shape(5600, 151936, 1536), Shape(45000, 151936, 1536)]


@dataclass(frozen=True)
class Op:
    """An op with its inputs and costs."""

    function: Callable
    inputs: Callable[..., dict[str, Any]]
    """(shape, dtype, device, seed) -> keyword arguments."""
    outputs: tuple[str, ...] = ("out",)
    """Names of its results; a named tuple has its own."""
    differentiable: tuple[str, ...] = ()
    """Arguments with a gradient."""
    matmuls: int = 0
    """Vocabulary matmuls of forward + backward with everything trained; one is 2 N V D FLOPs."""

    def run(self, inputs: dict[str, Any], impl: str = "auto") -> Any:
        return self.function(**inputs, impl=impl)

    def flops(self, shape: Shape) -> int:
        return self.matmuls * 2 * shape.N * shape.V * shape.D


def specs() -> dict[str, GRPOLoss]:
    """Return every loss type at every importance level that it has, with each option used somewhere."""
    out = {}
    for loss_type in LOSS_TYPES:
        for level in ("token", "sequence"):
            if level == "sequence" and loss_type in TOKEN_LEVEL:
                continue
            out[f"{loss_type}-{level}"] = GRPOLoss(
                loss_type,
                importance_level=level,
                temperature=TEMPERATURE,
                max_completion_length=64,
                epsilon_high=1.1 if loss_type == "cispo" else 0.28,
            )
    variations: dict[str, dict[str, Any]] = {
        "no-kl": {"beta": 0.0},
        "delta": {"delta": 1.3},
        "unbiased-kl": {"use_bias_correction_kl": True},
        "unbiased-kl-sequence": {"use_bias_correction_kl": True, "importance_level": "sequence"},
        "token-mask": {"vllm_importance_sampling_mode": "token_mask"},
        "token-truncate": {"vllm_importance_sampling_mode": "token_truncate"},
        "sequence-truncate": {"vllm_importance_sampling_mode": "sequence_truncate"},
    }
    bounds = {"vllm_importance_sampling_clip_max": 1.01, "vllm_importance_sampling_clip_min": 0.98}
    for name, options in variations.items():
        options = options if "sampling" not in str(options) else options | bounds
        out[name] = GRPOLoss(temperature=TEMPERATURE, **options)
    return out


def _head(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(shape.N, shape.D, generator=generator)
    weight = torch.randn(shape.V, shape.D, generator=generator) * (4 / shape.D**0.5)
    return generator, hidden.to(device, dtype), weight.to(device, dtype)


def logprob_inputs(
    shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0, ignored: float = 0.1
) -> dict[str, Any]:
    generator, hidden, weight = _head(shape, dtype, device, seed)
    target = torch.randint(shape.V, (shape.N,), generator=generator)
    target[torch.rand(shape.N, generator=generator) < ignored] = -100
    return {
        "hidden": hidden,
        "weight": weight,
        "target": target.to(device),
        "temperature": TEMPERATURE,
        "entropy": True,
    }


def sequences(N: int, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Return about eight sequences of uneven length, one of them empty, one with a single token if N allows."""
    generator = torch.Generator().manual_seed(seed + 1)
    S = max(3, min(8, N))
    sequence_id = torch.randint(2, S, (N,), generator=generator).sort().values
    sequence_id[:1] = 0  # sequence 1 stays empty
    advantage = torch.randn(S, generator=generator)
    advantage[-1] = 0.0
    return {"sequence_id": sequence_id.to(device), "advantage": advantage.to(device)}


def neighbours(logp: torch.Tensor, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return log-probs of the other policies, close enough to `logp` for ratios on both sides of a clip."""
    generator = torch.Generator().manual_seed(seed + 2)
    noise = torch.randn(3, len(logp), generator=generator).to(logp.device)
    old = logp + 0.2 * noise[0]
    return {"old_logp": old, "ref_logp": logp + 0.3 * noise[1], "sampler_logp": old + 0.02 * noise[2]}


def grpo_inputs(
    shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0, spec: GRPOLoss | None = None
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    logp = (torch.randn(shape.N, generator=generator) - 3).to(device)
    spec = spec or GRPOLoss(temperature=TEMPERATURE)
    return {"logp": logp, **sequences(shape.N, device, seed), **neighbours(logp, seed), "spec": spec}


def linear_grpo_inputs(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    spec: GRPOLoss | None = None,
    ignored: float = 0.1,
) -> dict[str, Any]:
    head = logprob_inputs(shape, dtype, device, seed, ignored)
    spec = spec or GRPOLoss(temperature=TEMPERATURE)
    with torch.no_grad():
        logp = linear_logprob(head["hidden"], head["weight"], head["target"], temperature=spec.temperature)
    assert isinstance(logp, torch.Tensor), "no entropy was asked for"
    head = {name: head[name] for name in ("hidden", "weight", "target")}
    return {**head, **sequences(shape.N, device, seed), **neighbours(logp, seed), "spec": spec}


def advantage_inputs(
    shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    groups = max(1, shape.N // 7)
    reward = torch.randint(0, 3, (7 * groups,), generator=generator) * 0.1
    return {"reward": reward.to(device), "group_size": 7}


def sample_inputs(
    shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    _, hidden, weight = _head(shape, dtype, device, seed)
    row = torch.arange(shape.N, device=device)
    return {
        "hidden": hidden,
        "weight": weight,
        "temperature": TEMPERATURE,
        "seed": seed,
        "row_key": row * 977,
        "position": row % 5,
    }


def gate_inputs(shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    gate_up = 3 * torch.randn(shape.N, 2 * shape.D, generator=generator)
    return {"gate_up": gate_up.to(device, dtype)}


def norm_inputs(shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    x, delta = torch.randn(2, shape.N, shape.D, generator=generator).to(device, dtype)
    weight = 1 + 0.3 * torch.randn(shape.D, generator=generator)
    return {"x": x, "delta": delta, "weight": weight.to(device, dtype)}


HEADS, KEY_HEADS, PAGE = 6, 2, 16


def _head_size(shape: Shape) -> int:
    """Return D, made even and at most 128."""
    return min(128, shape.D // 2 * 2)


def _pool(pages: int, d: int, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed + 1)
    pools = torch.randn(2, pages, PAGE, KEY_HEADS, d, generator=generator).to(device, dtype)
    return dict(zip(("keys", "values"), pools, strict=True))


def rope_inputs(shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Every row writes to a slot of its own."""
    generator = torch.Generator().manual_seed(seed)
    R, d, pages = shape.N, _head_size(shape), shape.N // PAGE + 1
    qkv = torch.randn(R, (HEADS + 2 * KEY_HEADS) * d, generator=generator)
    angle = 40 * torch.rand(R, d // 2, generator=generator).repeat(1, 2)
    slot = torch.randperm(pages * PAGE, generator=generator)[:R]
    return {
        "qkv": qkv.to(device, dtype),
        "cos": angle.cos().to(device, dtype),
        "sin": angle.sin().to(device, dtype),
        "slot": slot.to(device),
        **_pool(pages, d, dtype, device, seed),
    }


def page_inputs(shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Groups of three rows that share their first page; 17 to 42 tokens a row. Few rows: the interpreter runs a program
    for every row, head and split."""
    generator = torch.Generator().manual_seed(seed)
    R, n, d = min(shape.N, 6), 3, _head_size(shape)
    row = torch.arange(R, dtype=torch.int32, device=device)
    table = row[:, None] * n + torch.arange(n, dtype=torch.int32, device=device)
    table[:, 0] = row // 3 * 3 * n
    query = torch.randn(R, HEADS, d, generator=generator)
    return {
        "query": query.to(device, dtype),
        **_pool(n * R, d, dtype, device, seed),
        "pages": Pages(table, 17 + 5 * row, row // 3, torch.ones_like(row), PAGE),
    }


HEAD = ("hidden", "weight")
OPS: dict[str, Op] = {
    "linear_logprob": Op(linear_logprob, logprob_inputs, ("logp", "entropy"), HEAD, matmuls=4),
    "linear_grpo_loss": Op(linear_grpo_loss, linear_grpo_inputs, (), HEAD, matmuls=3),
    "grpo_loss": Op(grpo_loss, grpo_inputs, (), ("logp",)),
    "group_advantage": Op(group_advantage, advantage_inputs),
    "linear_sample": Op(linear_sample, sample_inputs, ("token", "logp"), matmuls=1),
    "add_rms_norm": Op(add_rms_norm, norm_inputs, ("sum", "out")),
    "rope_append": Op(rope_append, rope_inputs),
    "paged_attention": Op(paged_attention, page_inputs),
    "silu_mul": Op(silu_mul, gate_inputs),
}
"""By name: that of the function, of its file, and of the function in reference.py."""
