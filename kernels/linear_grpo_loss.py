"""Hidden states -> GRPO loss, with the gradients computed in the forward pass: three vocabulary matmuls.

For every chunk of tokens (loss_chunks.py):
    z = hidden W^T / T                                     matmul 1
    lse, logp, entropy, loss, coefficient g = d loss/d logp    one pass over the rows, or two (objective.py)
    dz = g (1_y - p)                                       in place
    d_hidden = dz W / T;   d_weight += dz^T hidden / T     matmuls 2 and 3, summed in fp32

The loss is a scalar, so the backward only multiplies by the incoming gradient. Tokens that cannot have a gradient
(ignored; without advantage if beta is 0) are set aside first and skip matmuls 2 and 3, ignored ones also 1; a frozen
weight skips 3, no_grad skips both.
One pass over the rows if `old_logp`, `sampler_logp` or `near_logp` is given.
If tokens depend on their whole sequence (GSPO, vespo, sequence-level sampler correction) chunks end on
sequence borders; if a sequence is longer than a chunk, log-probs come first, by a fourth matmul.
`sparse_tau` is an approximation of matmuls 2 and 3, off unless asked for (sparse_gradient.py).
fp16: coefficients are multiplied by a power of two until the backward, because 1 / num_tokens times a probability
underflows before a loss scale can reach it.

FLOPs 6NVD; the floor at N = 5,600, V = 151,936, D = 1,536: 7.84 TFLOP = 11.2 ms at 700 TF/s. Memory: one
chunk of logits and the fp32 d_weight. On CUDA the host waits for the GPU at the start if beta is 0 or sequences
must stay whole, after the chunks for the tokens set aside, and at the end if there was one pass: not capturable.
Tolerance: fp32 within 1e-5 of float64; bf16 error not above plain PyTorch bf16's.
Measured on a GPU: not yet.

Shapes: N scored tokens, V vocabulary, D hidden, S sequences.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .checks import (
    HEAD_IMPLS,
    IGNORE_INDEX,
    check_head,
    check_share,
    check_target,
    choose_impl,
    full_fp32,
    head_inputs,
    op_scope,
    require,
)
from .chunked_logits import scale_rows
from .chunks import chunk_rows_of, row_spans, sequence_spans
from .gradient_matmuls import GradientMatmuls
from .linear_logprob import linear_logprob
from .loss_chunks import LossChunks, LossInputs, TorchChunks, TritonChunks
from .loss_settings import GRPOLoss
from .objective import Evaluation, GRPOLossOutput, Tokens, check_loss_inputs, make_output, prepare_tokens
from .sparse_gradient import SparseTokens, add_chunk

COMPACT_BELOW = 0.9  # share of tokens with a gradient below which setting the others aside is cheaper


@functools.cache
def _say_drifted() -> None:
    logging.getLogger(__name__).warning(
        "linear_grpo_loss: a token's log-prob is more than 60 nats from the one that was given for it; such calls take "
        "longer, because every row of logits is read twice"
    )


class _Results(NamedTuple):
    logp: torch.Tensor
    """[N], as entropy."""
    entropy: torch.Tensor
    evaluation: Evaluation
    d_hidden: torch.Tensor | None
    d_weight: torch.Tensor | None
    how: SparseTokens | None
    """None if `sparse_tau` is 0."""


def _chunks(inputs: LossInputs) -> _Results | None:
    """Return the results, with d_hidden and with d_weight in fp32; None if `inputs.near` was not near."""
    hidden, weight, impl = inputs.hidden, inputs.weight, inputs.impl
    trained = any(inputs.needs_grad)
    N = len(hidden)
    rows = chunk_rows_of(hidden, weight)
    spans = sequence_spans(inputs.tokens.sequence_id, rows) if inputs.coupled else list(row_spans(N, rows))
    score_first = spans is None or not trained
    first = _logprobs(inputs) if score_first else None
    near = inputs.near if first is None else first[0]
    if hidden.dtype == torch.float16 or not trained:
        near = None  # 2^(z - lse) leaves the range of fp16
    make = TorchChunks if impl == "torch" else TritonChunks
    chunks: LossChunks = make(inputs._replace(near=near), rows if trained else 0)
    if first is not None:
        chunks.logp, chunks.entropy = first
        chunks.evaluate_all()
    matmuls = GradientMatmuls(inputs, chunks.weight)
    how = SparseTokens.none(hidden) if inputs.sparse_tau else None
    for a, b in (spans or row_spans(N, rows)) if trained else ():
        if score_first:
            chunks.rescore(a, b)
        else:
            chunks.score(a, b)
        if how is None:
            matmuls.add(slice(a, b), chunks.dlogits(a, b))
        else:
            live = chunks.result.gradient[a:b] != 0
            likely = chunks.likely_columns(a, b)  # before the gradient overwrites what they are found in
            add_chunk(matmuls, how, a, chunks.dlogits(a, b), live, likely)
    if not score_first and chunks.drifted():
        return None
    return _Results(chunks.logp, chunks.entropy, chunks.result, matmuls.d_hidden, matmuls.d_weight, how)


@torch.no_grad()
def _logprobs(inputs: LossInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-prob and entropy of each token."""
    temperature = inputs.spec.temperature
    head = (inputs.hidden, inputs.weight, inputs.target)
    logp, entropy = linear_logprob(*head, temperature=temperature, entropy=True, impl=inputs.impl)
    return logp, entropy


def _set_aside(tokens: Tokens, spec: GRPOLoss) -> torch.Tensor | None:
    """Return the indices of the tokens that can have a gradient, or None if (nearly) all can. With a KL that is every
    scored token, and on CUDA the search for ignored ones is not worth a synchronisation."""
    if spec.beta != 0 and tokens.scored.is_cuda:
        return None
    live = tokens.scored if spec.beta != 0 else tokens.scored & (tokens.advantage != 0)
    index = live.nonzero()[:, 0]
    return index if len(index) < COMPACT_BELOW * len(live) else None


def _forward(inputs: LossInputs) -> _Results:
    """`_chunks`, again with two passes if `inputs.near` was not near: only then, because the first try's memory is
    free."""
    found = _chunks(inputs)
    if found is None:
        _say_drifted()
        found = _chunks(inputs._replace(near=None))
    assert found is not None, "without log-probs at hand nothing can drift"
    return found


def _forward_of_live(inputs: LossInputs) -> _Results:
    """`_forward` of the tokens that can have a gradient, and the log-probs of the others."""
    live = _set_aside(inputs.tokens, inputs.spec) if any(inputs.needs_grad) else None
    if live is None:
        return _forward(inputs)
    part = _forward(inputs.select(live))
    rest = inputs.tokens.scored.clone()
    rest[live] = False
    rest = rest.nonzero()[:, 0]  # scored, but without a gradient
    other = _logprobs(inputs.select(rest))
    N = len(inputs.hidden)

    def spread(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(N, *values.shape[1:]).index_copy_(0, live, values)

    logp, entropy = (spread(x).index_copy_(0, rest, y) for x, y in zip(part[:2], other, strict=True))
    d_hidden = None if part.d_hidden is None else spread(part.d_hidden)
    how = None if part.how is None else SparseTokens(*map(spread, part.how))
    return _Results(logp, entropy, Evaluation(*map(spread, part.evaluation)), d_hidden, part.d_weight, how)


def _power_of_two(scale: torch.Tensor) -> torch.Tensor:
    """Return a 0-d power of two that brings the largest coefficient near 2^-6, without a host sync: importance ratios
    and KL terms may be far above 1."""
    most = scale.amax() if scale.numel() else scale.new_ones(())
    return torch.exp2(-6 - torch.floor(torch.log2(most.clamp(min=2.0**-60))))


class _LinearGRPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, inputs: LossInputs):
        """`hidden` and `weight` are those of `inputs`: autograd looks at arguments."""
        ctx.power, tokens = None, inputs.tokens
        if hidden.dtype == torch.float16:
            ctx.power = _power_of_two(tokens.scale)
            tokens = replace(tokens, scale=tokens.scale * ctx.power)
        logp, entropy, result, d_hidden, d_weight, how = _forward_of_live(inputs._replace(tokens=tokens))
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtype, ctx.impl = hidden.dtype, inputs.impl
        loss = result.loss.sum()
        rest = (logp, entropy, result.kl, result.clip_low, result.clip_high, *(how or ()))
        ctx.mark_non_differentiable(*rest)
        return loss if ctx.power is None else loss / ctx.power, *rest

    @staticmethod
    @once_differentiable
    @op_scope
    @full_fp32()
    def backward(ctx, grad_loss: torch.Tensor, *_):
        factor = grad_loss if ctx.power is None else grad_loss / ctx.power
        scaled = (None if d is None else scale_rows(d, factor, ctx.dtype, ctx.impl) for d in ctx.saved_tensors)
        return *scaled, None


@op_scope
@full_fp32()
def linear_grpo_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    sequence_id: torch.Tensor,
    advantage: torch.Tensor,
    *,
    spec: GRPOLoss,
    old_logp: torch.Tensor | None = None,
    ref_logp: torch.Tensor | None = None,
    sampler_logp: torch.Tensor | None = None,
    near_logp: torch.Tensor | None = None,
    num_sequences: int | float | torch.Tensor | None = None,
    num_tokens: int | float | torch.Tensor | None = None,
    sparse_tau: float = 0.0,
    impl: str = "auto",
) -> GRPOLossOutput:
    """Return the GRPO loss of the tokens that `hidden` predicts; differentiable in `hidden` and `weight`.

    Args:
        hidden: [N, D] bf16, fp16 or fp32.
        weight: [V, D], the lm_head, same dtype. Frozen (or tied to an embedding) is fine.
        target: [N] int64; -100 = ignored.
        sequence_id: [N] int, non-decreasing; which entry of `advantage` a token belongs to.
        advantage: [S].
        spec: the loss, and the temperature of the softmax.
        old_logp: this and the next four as in `grpo_loss`.
        ref_logp: [N].
        sampler_logp: [N].
        near_logp: [N] log-probs within some nats of the policy's, NaN where unknown. They change no result, but save
            a pass over the logits. `old_logp` or `sampler_logp` serves if this is None.
        num_sequences: denominator.
        num_tokens: denominator.
        sparse_tau: in [0, 1). 0: exact gradients. Above, tokens with at most this probability outside a few columns of
            the vocabulary leave the other columns out of their gradient (sparse_gradient.py): an approximation with
            a bound that the output tells. Loss, log-probs and entropy stay exact.
        impl: auto | triton | torch | reference | gluon (gluon_exponentials.py: sm_90, bf16 or fp16; not measured yet).
    """
    impl = choose_impl(impl, hidden, impls=HEAD_IMPLS)
    if impl == "reference":
        from . import reference

        return reference.linear_grpo_loss(
            hidden,
            weight,
            target,
            sequence_id,
            advantage,
            spec=spec,
            old_logp=old_logp,
            ref_logp=ref_logp,
            sampler_logp=sampler_logp,
            near_logp=near_logp,
            num_sequences=num_sequences,
            num_tokens=num_tokens,
            sparse_tau=sparse_tau,
        )
    check_head(hidden, weight, impl)
    check_target(target, hidden, weight.shape[0])
    check_share("sparse_tau", sparse_tau)
    optional = {"old_logp": old_logp, "ref_logp": ref_logp, "sampler_logp": sampler_logp, "near_logp": near_logp}
    denominators = {"num_sequences": num_sequences, "num_tokens": num_tokens}
    check_loss_inputs(spec, hidden, sequence_id, advantage, optional, denominators)
    scored = target != IGNORE_INDEX
    tokens = prepare_tokens(
        spec, sequence_id, advantage, scored, torch.float32, old_logp, ref_logp, sampler_logp, num_sequences, num_tokens
    )
    hidden, weight, target = head_inputs(impl, hidden, weight, target)
    fits = impl != "gluon" or len(weight) % 8 == 0
    require(fits, "impl", f"'gluon' needs a vocabulary of a multiple of 8, not {len(weight)}")
    recording = torch.is_grad_enabled()
    needs_grad = (recording and hidden.requires_grad, recording and weight.requires_grad)
    near = next((x.detach() for x in (near_logp, sampler_logp, old_logp) if x is not None), None)
    inputs = LossInputs(hidden, weight, target, tokens, spec, near, needs_grad, impl, float(sparse_tau))
    loss, logp, entropy, kl, low, high, *how = _LinearGRPOLoss.apply(hidden, weight, inputs)
    out = make_output(spec, loss, logp, entropy, kl, low, high, scored)
    return out._replace(**SparseTokens(*how).summary(scored)) if how else out
