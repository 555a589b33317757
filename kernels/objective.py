"""The losses of the GRPO family: the one copy of their mathematics.

Token t of sequence s with advantage A, log-probs x (policy), o (behaviour: `old_logp`, else x held
constant), r (reference model), q (the sampler's own):

    importance  w_t = exp(x - o), or one value a sequence: exp(mean over s of (x - o))       (GSPO)
    correction  k_t = bounded exp(o - q), a token or a sequence                              (TIS / MIS)
    kl_t        = e^d - d - 1 with d = r - x  (k3), times w_t with `use_bias_correction_kl`
    policy_t    grpo bnpo dr_grpo dapo luspo   -min(min(w, delta) A, clip(w, 1-e_low, 1+e_high) A)
                cispo                          -min(w, e_high) A x          (the factor of x is constant)
                sapo                           -4/tau sigmoid(tau (w - 1)) A      tau by the sign of A
                vespo                          -phi(W) A x,  W = product over s of clamped w_t k_t,
                                               phi(W) = e^lambda W^k e^(-lambda W), constant
    loss        = sum over t of c_t (k_t policy_t + beta kl_t);       k_t lives inside phi for vespo
    c_t         grpo sapo 1/(n_s S)    bnpo dapo cispo vespo 1/N    luspo 1/S    dr_grpo 1/(S max_length)

`token_loss` and what it calls are written in the common subset of Triton and PyTorch. The kernels inline them;
`torch_twin` runs the same code objects with `tl` bound to tensor functions. `token_loss` returns the value and its
closed-form derivative; `reference.py` ignores the derivative and lets autograd differentiate the value, so the tests
check one against the other.

Shapes: N scored tokens, S sequences.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .checks import REFERENCE_FLOATS, check_denominator, check_sequences, check_tensor, require
from .loss_settings import GRPOLoss, LossFlags, LossNumbers


class GRPOLossOutput(NamedTuple):
    """Only `loss` carries a gradient; ignored tokens hold 0 in the per-token tensors."""

    loss: torch.Tensor
    """0-d fp32."""
    logp: torch.Tensor
    """[N] log-probs of the targets under the policy."""
    entropy: torch.Tensor | None
    """[N] entropy of the policy; None from `grpo_loss`, which sees no logits."""
    kl: torch.Tensor | None
    """[N] k3 estimate of the KL to the reference model, uncorrected; None when beta is 0."""
    clip_low: torch.Tensor
    """0-d: fraction of scored tokens clipped from below with a negative advantage."""
    clip_high: torch.Tensor
    """0-d: fraction clipped from above with a positive advantage (cispo: above epsilon_high)."""
    dropped: torch.Tensor | None = None
    """[N] with `sparse_tau`, else None, as the next two. Probability that a token's gradient left out, at most; 0 of a
    token whose gradient is exact. |error of d_hidden| <= |d loss / d logp| dropped max |weight row| / temperature, up
    to rounding."""
    dense_rows: torch.Tensor | None = None
    """0-d: fraction of scored tokens whose gradient took all columns of the vocabulary."""
    kept: torch.Tensor | None = None
    """0-d: share of the columns that the others took, mean over those; 0 if there are none."""


# --- per token, in Triton and (through `torch_twin`) in PyTorch -----------------------------------


@triton.jit
def constant(x):
    return x  # the PyTorch version detaches


@triton.jit
def sampler_ratio(log_ratio, numbers, SPEC: tl.constexpr):
    """exp(old - sampler), truncated to the bounds or zeroed outside them."""
    ratio = tl.exp(log_ratio)
    bounded = ratio
    if SPEC.clip_max:
        bounded = tl.minimum(bounded, numbers.clip_max)
    if SPEC.clip_min:
        bounded = tl.maximum(bounded, numbers.clip_min)
    if SPEC.sampler_masks:
        bounded = tl.where(bounded == ratio, ratio, 0.0)
    return bounded


@triton.jit
def vespo_log_ratio(log_ratio):
    """What a token adds to its sequence's log W."""
    return tl.minimum(tl.maximum(log_ratio, -20.0), 20.0)


@triton.jit
def vespo_log_correction(correction):
    """What a sampler correction adds to log W: of each token, or once of the whole sequence."""
    return tl.minimum(tl.log(tl.maximum(correction, 1e-8)), 20.0)


@triton.jit
def k3(logp, ref):
    """e^d - d - 1 for d = ref - logp; as a series for small d, where the direct form cancels."""
    d = ref - logp
    near = tl.minimum(tl.maximum(d, -0.25), 0.25)
    tail = 1 / 6 + near * (1 / 24 + near * (1 / 120 + near * (1 / 720)))
    series = near * near * (0.5 + near * tail)
    return tl.where(d == near, series, tl.exp(d) - d - 1.0)


@triton.jit
def policy_loss(logp, log_weight, log_product, advantage, correction, numbers, SPEC: tl.constexpr):
    """Return value, d/d log_weight, d/d logp, clipped below, clipped above; all before c_t and the KL.
    `log_product` is vespo's log W; the other losses do not use it. `numbers`: LossNumbers; SPEC: LossFlags."""
    low = advantage != advantage  # false: an advantage is never NaN
    high = low
    if SPEC.loss_type == "cispo":
        ratio = tl.exp(log_weight)
        factor = constant(tl.minimum(ratio, numbers.high)) * advantage * correction
        high = (ratio > numbers.high) & (advantage > 0)
        value = -factor * logp
        d_weight = 0.0 * factor
        d_logp = -factor
    elif SPEC.loss_type == "vespo":
        k = tl.where(advantage >= 0, numbers.vespo_k_pos, numbers.vespo_k_neg)
        lam = tl.where(advantage >= 0, numbers.vespo_lambda_pos, numbers.vespo_lambda_neg)
        lam = tl.maximum(lam, 1e-4)
        log_w = tl.minimum(tl.maximum(constant(log_product), -18.420680743952367), 20.0)  # log 1e-8
        factor = tl.exp(lam + k * log_w - lam * tl.exp(log_w)) * advantage
        value = -factor * logp
        d_weight = 0.0 * factor
        d_logp = -factor
    elif SPEC.loss_type == "sapo":
        tau = tl.where(advantage > 0, numbers.sapo_temperature_pos, numbers.sapo_temperature_neg)
        ratio = tl.exp(log_weight)
        gate = 1.0 / (1.0 + tl.exp(-tau * (ratio - 1.0)))
        value = -4.0 / tau * gate * advantage * correction
        d_weight = -4.0 * gate * (1.0 - gate) * ratio * advantage * correction
        d_logp = 0.0 * d_weight
    else:
        ratio = tl.exp(log_weight)
        free = ratio
        if SPEC.delta:
            free = tl.minimum(ratio, numbers.delta)
        clipped = tl.minimum(tl.maximum(ratio, numbers.low), numbers.high)
        low = (free < numbers.low) & (advantage < 0)
        high = (free > numbers.high) & (advantage > 0)
        value = -tl.minimum(free * advantage, clipped * advantage) * correction
        # the gradient is that of the smaller branch: zero if that one is clamped at a bound
        taken = tl.where(free * advantage <= clipped * advantage, free, clipped)
        d_weight = -tl.where(taken == ratio, ratio * advantage * correction, 0.0)
        d_logp = 0.0 * d_weight
    return value, d_weight, d_logp, low, high


@triton.jit
def token_loss(logp, log_weight, log_product, ref, advantage, correction, numbers, SPEC: tl.constexpr):
    """Return `policy_loss` plus beta KL: value, d/d log_weight, d/d logp, kl, clipped below, clipped above."""
    value, d_weight, d_logp, low, high = policy_loss(
        logp, log_weight, log_product, advantage, correction, numbers, SPEC
    )
    kl = 0.0 * logp
    if SPEC.kl:
        kl = k3(logp, ref)
        d_kl = logp - ref - kl  # = 1 - e^d
        if SPEC.unbiased_kl:
            ratio = tl.exp(log_weight)
            value += numbers.beta * kl * ratio
            d_weight += numbers.beta * kl * ratio
            d_logp += numbers.beta * d_kl * ratio
        else:
            value += numbers.beta * kl
            d_logp += numbers.beta * d_kl
    return value, d_weight, d_logp, kl, low, high


def _with_scalar(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """torch.minimum and torch.maximum take tensors only."""

    def apply(a: torch.Tensor, b: torch.Tensor | float) -> torch.Tensor:
        return function(a, torch.as_tensor(b, dtype=a.dtype, device=a.device))

    return apply


def _exp(x: torch.Tensor) -> torch.Tensor:
    return torch.exp2(x * (1 / math.log(2.0)))  # torch.exp stalls on MKL's threads right after a matmul


_TORCH_TL = types.SimpleNamespace(
    exp=_exp,
    log=torch.log,
    where=torch.where,
    minimum=_with_scalar(torch.minimum),
    maximum=_with_scalar(torch.maximum),
    constexpr=None,
)
_TWINS: dict[str, Any] = {"tl": _TORCH_TL, "constant": torch.Tensor.detach, "__builtins__": __builtins__}


def torch_twin(kernel_function: triton.JITFunction) -> types.FunctionType:
    """Return a function that runs the Python code of a `@triton.jit` function on tensors."""
    fn = kernel_function.fn
    twin = types.FunctionType(fn.__code__, _TWINS, fn.__name__)
    _TWINS[fn.__name__] = twin
    return twin


sampler_ratio_torch = torch_twin(sampler_ratio)
vespo_log_ratio_torch = torch_twin(vespo_log_ratio)
vespo_log_correction_torch = torch_twin(vespo_log_correction)
torch_twin(k3)
torch_twin(policy_loss)
token_loss_torch = torch_twin(token_loss)


# --- a batch of tokens -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """All inputs of the loss besides the log-probs of its N tokens. All [N] but `scored_count` and `end`."""

    sequence_id: torch.Tensor
    scored: torch.Tensor
    """bool; False = ignored"""
    advantage: torch.Tensor
    """Advantage of the token's sequence."""
    scale: torch.Tensor
    """c_t, 0 where ignored."""
    scored_count: torch.Tensor
    """[S] scored tokens of each sequence, at least 1."""
    end: torch.Tensor
    """[S] where each sequence ends in the whole batch, sliced or not."""
    old: torch.Tensor | None
    ref: torch.Tensor | None
    sampler: torch.Tensor | None

    def slice(self, start: int, stop: int) -> Tokens:
        """Return the tokens start .. stop."""
        values = {name: getattr(self, name) for name in PER_TOKEN}
        return replace(self, **{name: x[start:stop] for name, x in values.items() if x is not None})

    def select(self, index: torch.Tensor) -> Tokens:
        """Return the tokens of these ascending indices. A sequence keeps its count."""
        chosen = {name: x[index] for name in PER_TOKEN if (x := getattr(self, name)) is not None}
        number = torch.arange(len(self.end), device=index.device)
        return replace(self, **chosen, end=torch.searchsorted(chosen["sequence_id"], number, right=True))


PER_TOKEN = ("sequence_id", "scored", "advantage", "scale", "old", "ref", "sampler")


def prepare_tokens(
    spec: GRPOLoss,
    sequence_id: torch.Tensor,
    advantage: torch.Tensor,
    scored: torch.Tensor,
    dtype: torch.dtype,
    old: torch.Tensor | None = None,
    ref: torch.Tensor | None = None,
    sampler: torch.Tensor | None = None,
    num_sequences: int | float | torch.Tensor | None = None,
    num_tokens: int | float | torch.Tensor | None = None,
) -> Tokens:
    """Look up each token's advantage and c_t; no host sync. `ref` is dropped if beta is 0."""
    if spec.beta == 0:
        ref = None
    S = advantage.shape[0]
    sequence_id = sequence_id.long().contiguous()  # the kernels read [N] tensors without strides
    # counts from a running sum of the sorted ids: no atomics, so no order to vary
    end = torch.searchsorted(sequence_id, torch.arange(S, device=scored.device), right=True)
    running = torch.nn.functional.pad(scored.cumsum(0), (1, 0))
    count = running[end].diff(prepend=running.new_zeros(1)).clamp(min=1).to(dtype)
    if num_sequences is None:
        num_sequences = max(S, 1)
    if num_tokens is None:
        num_tokens = running[-1]
    sequences = _scalar(num_sequences, dtype, scored.device).clamp(min=1)
    if spec.loss_type in ("grpo", "sapo"):
        scale = 1.0 / (count * sequences)[sequence_id]
    elif spec.loss_type == "luspo":
        scale = 1.0 / sequences
    elif spec.loss_type == "dr_grpo":
        assert spec.max_completion_length is not None, "checked by GRPOLoss"
        scale = 1.0 / (sequences * spec.max_completion_length)
    else:
        scale = 1.0 / _scalar(num_tokens, dtype, scored.device).clamp(min=1)
    return Tokens(
        sequence_id,
        scored,
        advantage.to(dtype)[sequence_id],
        scored * scale,
        count,
        end,
        *(None if x is None else x.detach().to(dtype).contiguous() for x in (old, ref, sampler)),
    )


def _scalar(x: int | float | torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a 0-d tensor. A number is filled in on the device: a copy from the host would wait for it."""
    if isinstance(x, torch.Tensor):
        return x.to(device, dtype)
    return torch.full((), x, dtype=dtype, device=device)


class Evaluation(NamedTuple):
    """Loss and gradient of each token, all [N]."""

    loss: torch.Tensor
    """c_t times the token's loss."""
    gradient: torch.Tensor
    """d loss / d logp, c_t included."""
    kl: torch.Tensor
    clip_low: torch.Tensor
    """bool"""
    clip_high: torch.Tensor
    """bool"""


def evaluate(logp: torch.Tensor, tokens: Tokens, spec: GRPOLoss) -> Evaluation:
    """Return the loss and its closed-form gradient, in PyTorch. `tokens` must hold whole sequences if
    `spec.couples_tokens`. `loss` is differentiable by autograd too."""
    flags, numbers = LossFlags.of(spec, tokens.sampler is not None), LossNumbers.of(spec)
    fixed, scored, ids = logp.detach(), tokens.scored, tokens.sequence_id

    def per_sequence(x: torch.Tensor) -> torch.Tensor:  # [N] -> [N], sums over the token's sequence
        return x.new_zeros(tokens.scored_count.shape).index_add(0, ids, x)[ids]

    old = fixed if tokens.old is None else tokens.old
    log_ratio = torch.where(scored, logp - old, 0.0)
    correction = torch.ones_like(fixed)
    if tokens.sampler is not None:
        # a token that the sampler could not score has NaN and is not corrected, as in TRL
        mismatch = torch.where(scored, old - tokens.sampler, 0.0).nan_to_num(nan=0.0)
        mismatch = per_sequence(mismatch) if spec.sampler_per_sequence else mismatch
        correction = sampler_ratio_torch(mismatch, numbers, flags)
    log_weight = log_product = log_ratio
    count = tokens.scored_count[ids]
    if spec.loss_type == "vespo":
        log_correction = vespo_log_correction_torch(correction)
        if spec.sampler_per_sequence:
            log_correction = 1.0 / count * log_correction  # a sequence's correction counts once
        log_product = per_sequence(torch.where(scored, vespo_log_ratio_torch(log_ratio) + log_correction, 0.0))
    elif spec.importance_level == "sequence":
        log_weight = per_sequence(log_ratio) / count
    ref = fixed if tokens.ref is None else torch.where(scored, tokens.ref, 0.0)
    value, d_weight, d_logp, kl, low, high = token_loss_torch(
        logp, log_weight, log_product, ref, tokens.advantage, correction, numbers, flags
    )
    scale = tokens.scale  # 0 where ignored; every other factor there is finite
    d_weight = d_weight * scale
    if spec.importance_level == "sequence":
        d_weight = per_sequence(d_weight) / count * scored
    gradient = d_weight + d_logp * scale
    return Evaluation(value * scale, gradient, kl * scored, low & scored, high & scored)


def check_loss_inputs(
    spec: GRPOLoss,
    like: torch.Tensor,
    sequence_id: torch.Tensor,
    advantage: torch.Tensor,
    optional: dict[str, torch.Tensor | None],
    denominators: dict[str, int | float | torch.Tensor | None],
) -> None:
    """Check the arguments that `grpo_loss` and `linear_grpo_loss` share; `like` is the [N, ...] tensor."""
    require(isinstance(spec, GRPOLoss), "spec", f"expected a GRPOLoss, got {type(spec).__name__}")
    check_sequences(sequence_id, advantage, like)
    for name, x in optional.items():
        if x is not None:
            check_tensor(name, x, (like.shape[0],), REFERENCE_FLOATS, like)
    for name, value in denominators.items():
        check_denominator(name, value)
    missing = spec.beta != 0 and optional["ref_logp"] is None
    require(not missing, "ref_logp", f"must be given, because beta is {spec.beta}")


def make_output(
    spec: GRPOLoss,
    loss: torch.Tensor,
    logp: torch.Tensor,
    entropy: torch.Tensor | None,
    kl: torch.Tensor,
    clip_low: torch.Tensor,
    clip_high: torch.Tensor,
    scored: torch.Tensor,
) -> GRPOLossOutput:
    """Build the output of an op; `clip_low` and `clip_high` [N] bool become fractions of the scored tokens."""
    total = scored.sum().clamp(min=1)
    low, high = (clipped.sum() / total for clipped in (clip_low, clip_high))
    return GRPOLossOutput(loss, logp, entropy, kl if spec.beta != 0 else None, low, high)
