"""Log-probs -> GRPO loss, every loss type (the mathematics: objective.py).

    loss = sum over t of c_t l_t(logp_t, old_t, ref_t, sampler_t, A_s);   gradient d loss / d logp [N]

Both are computed in the forward pass, so the backward is one multiply by the incoming gradient.
Bytes per token, at most: read 6 fp32 (log-probs of four policies, advantage, scale) and the scored flag; write 3
fp32 and 2 flags. Losses over sequences read part of it again. Hardly any FLOPs: launch bound below a million tokens.
Tolerance: fp32 within 1e-5 of float64.   Measured on a GPU: not yet.

Shapes: N scored tokens, S sequences.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .checks import check_tensor, choose_impl, op_scope
from .loss_settings import GRPOLoss, LossFlags, LossNumbers
from .objective import (
    Evaluation,
    GRPOLossOutput,
    Tokens,
    check_loss_inputs,
    evaluate,
    make_output,
    prepare_tokens,
    sampler_ratio,
    token_loss,
    vespo_log_correction,
    vespo_log_ratio,
)

__all__ = ["GRPOLoss", "GRPOLossOutput", "grpo_loss"]


@triton.jit
def load_old(logp, old_ptr, offset, scored, HAS_OLD: tl.constexpr):
    """Return the behaviour policy's log-probs: the policy's own if on-policy. 0 where not `scored`."""
    old = logp
    if HAS_OLD:
        old = tl.load(old_ptr + offset, mask=scored, other=0.0)
    return old


@triton.jit
def load_mismatch(old, sampler_ptr, offset, scored):
    """Return behaviour policy minus sampler in log-probs. 0 where not `scored`, and where the sampler has NaN because
    it could not score the token."""
    mismatch = old - tl.load(sampler_ptr + offset, mask=scored, other=0.0)
    return tl.where(mismatch == mismatch, mismatch, 0.0)


@triton.jit(
    do_not_specialize=["first", "last"],
    do_not_specialize_on_alignment=["logp_ptr", "old_ptr", "ref_ptr", "sampler_ptr"],
)
def grpo_loss_kernel(
    logp_ptr,
    advantage_ptr,
    scale_ptr,
    scored_ptr,
    old_ptr,
    ref_ptr,
    sampler_ptr,  # [N]
    count_ptr,
    end_ptr,  # [S]
    loss_ptr,
    gradient_ptr,
    kl_ptr,
    low_ptr,
    high_ptr,  # [N]
    numbers,
    first,
    last,
    SPEC: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_SAMPLER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per sequence; tokens first .. last belong to this launch."""
    sequence = tl.program_id(0)
    begin = tl.load(end_ptr + sequence - 1, mask=sequence > 0, other=0)
    begin = tl.maximum(begin, first)
    end = tl.minimum(tl.load(end_ptr + sequence), last)
    count = tl.load(count_ptr + sequence)
    per_sequence: tl.constexpr = SPEC.sequence_level
    sequence_sampler: tl.constexpr = HAS_SAMPLER and SPEC.sampler_per_sequence
    token_sampler: tl.constexpr = HAS_SAMPLER and not SPEC.sampler_per_sequence

    sum_ratio = 0.0  # over the sequence: log ratios, or vespo's log W
    sum_mismatch = 0.0
    if SPEC.coupled:
        for block in range(begin, end, BLOCK):
            offset = block + tl.arange(0, BLOCK)
            scored = tl.load(scored_ptr + offset, mask=offset < end, other=0) != 0
            logp = tl.load(logp_ptr + offset, mask=scored, other=0.0)
            old = load_old(logp, old_ptr, offset, scored, HAS_OLD)
            log_ratio = logp - old
            if SPEC.loss_type == "vespo":
                log_ratio = vespo_log_ratio(log_ratio)
                if token_sampler:
                    mismatch = load_mismatch(old, sampler_ptr, offset, scored)
                    log_ratio += vespo_log_correction(sampler_ratio(mismatch, numbers, SPEC))
                log_ratio = tl.where(scored, log_ratio, 0.0)
            sum_ratio += tl.sum(log_ratio, 0)
            if sequence_sampler:
                sum_mismatch += tl.sum(load_mismatch(old, sampler_ptr, offset, scored), 0)
    sequence_correction = 1.0
    if sequence_sampler:
        sequence_correction = sampler_ratio(sum_mismatch, numbers, SPEC)
        if SPEC.loss_type == "vespo":
            sum_ratio += vespo_log_correction(sequence_correction)

    zeros = tl.zeros([BLOCK], tl.float32)  # adding it broadcasts a value of the sequence to its tokens
    sum_d_weight = 0.0
    for block in range(begin, end, BLOCK):
        offset = block + tl.arange(0, BLOCK)
        in_sequence = offset < end
        scored = tl.load(scored_ptr + offset, mask=in_sequence, other=0) != 0
        logp = tl.load(logp_ptr + offset, mask=scored, other=0.0)
        advantage = tl.load(advantage_ptr + offset, mask=in_sequence, other=0.0)
        scale = tl.load(scale_ptr + offset, mask=in_sequence, other=0.0)
        old = load_old(logp, old_ptr, offset, scored, HAS_OLD)
        correction = zeros + sequence_correction
        if token_sampler:
            correction = sampler_ratio(load_mismatch(old, sampler_ptr, offset, scored), numbers, SPEC)
        log_weight = logp - old
        if per_sequence:
            log_weight = zeros + sum_ratio / count
        ref = logp
        if SPEC.kl:
            ref = tl.load(ref_ptr + offset, mask=scored, other=0.0)
        value, d_weight, d_logp, kl, low, high = token_loss(
            logp, log_weight, zeros + sum_ratio, ref, advantage, correction, numbers, SPEC
        )
        gradient = d_logp * scale
        if per_sequence:
            sum_d_weight += tl.sum(d_weight * scale, 0)
        else:
            gradient += d_weight * scale
        tl.store(loss_ptr + offset, value * scale, mask=in_sequence)
        tl.store(gradient_ptr + offset, gradient, mask=in_sequence)
        tl.store(kl_ptr + offset, tl.where(scored, kl, 0.0), mask=in_sequence)
        tl.store(low_ptr + offset, low & scored, mask=in_sequence)
        tl.store(high_ptr + offset, high & scored, mask=in_sequence)

    if per_sequence:
        tl.debug_barrier()  # the gradients stored above are read back
        for block in range(begin, end, BLOCK):
            offset = block + tl.arange(0, BLOCK)
            scored = tl.load(scored_ptr + offset, mask=offset < end, other=0) != 0
            gradient = tl.load(gradient_ptr + offset, mask=scored, other=0.0)
            tl.store(gradient_ptr + offset, gradient + sum_d_weight / count, mask=scored)


def empty_evaluation(logp: torch.Tensor) -> Evaluation:
    """Return uninitialised per-token results."""
    flags = [torch.empty_like(logp, dtype=torch.bool) for _ in range(2)]
    return Evaluation(*(torch.empty_like(logp) for _ in range(3)), *flags)


def evaluate_triton(logp: torch.Tensor, tokens: Tokens, spec: GRPOLoss, out: Evaluation, first: int, last: int) -> None:
    """Run `evaluate` in Triton for the tokens first .. last of the whole batch, and write the results into `out`."""
    old, ref, sampler = (logp if x is None else x for x in (tokens.old, tokens.ref, tokens.sampler))
    S = tokens.end.shape[0]
    if S > 0 and last > first:
        grpo_loss_kernel[(S,)](
            logp,
            tokens.advantage,
            tokens.scale,
            tokens.scored,
            old,
            ref,
            sampler,
            tokens.scored_count,
            tokens.end,
            *out,
            LossNumbers.of(spec),
            first,
            last,
            LossFlags.of(spec, tokens.sampler is not None),
            tokens.old is not None,
            tokens.sampler is not None,
            BLOCK=1024,
        )


class _GRPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logp: torch.Tensor, tokens: Tokens, spec: GRPOLoss, impl: str):
        if impl == "triton":
            result = empty_evaluation(logp)
            evaluate_triton(logp.contiguous(), tokens, spec, result, 0, len(logp))
        else:
            result = evaluate(logp, tokens, spec)
        ctx.save_for_backward(result.gradient)
        ctx.mark_non_differentiable(*result[2:])
        return result.loss.sum(), *result[2:]

    @staticmethod
    @once_differentiable
    @op_scope
    def backward(ctx, grad_loss: torch.Tensor, *_):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss, None, None, None


@op_scope
def grpo_loss(
    logp: torch.Tensor,
    sequence_id: torch.Tensor,
    advantage: torch.Tensor,
    *,
    spec: GRPOLoss,
    old_logp: torch.Tensor | None = None,
    ref_logp: torch.Tensor | None = None,
    sampler_logp: torch.Tensor | None = None,
    num_sequences: int | float | torch.Tensor | None = None,
    num_tokens: int | float | torch.Tensor | None = None,
    impl: str = "auto",
) -> GRPOLossOutput:
    """Return the GRPO loss of given log-probs; differentiable in `logp`.

    Args:
        logp: [N] fp32 log-probs of the scored tokens under the policy.
        sequence_id: [N] int, non-decreasing; which entry of `advantage` a token belongs to.
        advantage: [S].
        spec: the loss.
        old_logp: [N] behaviour policy; None = on-policy (importance 1, with its gradient).
        ref_logp: [N] reference model; needed when `spec.beta` > 0.
        sampler_logp: [N] as the sampler reported them; corrects for their mismatch with `old_logp`.
        num_sequences: denominator over all micro-batches and ranks (default: local). A tensor is
            not read on the host: values below 1, such as an empty batch's 0, count as 1.
        num_tokens: likewise.
        impl: auto | triton | torch | reference.
    """
    impl = choose_impl(impl, logp, "logp")
    if impl == "reference":
        from . import reference

        return reference.grpo_loss(
            logp,
            sequence_id,
            advantage,
            spec=spec,
            old_logp=old_logp,
            ref_logp=ref_logp,
            sampler_logp=sampler_logp,
            num_sequences=num_sequences,
            num_tokens=num_tokens,
        )
    check_tensor("logp", logp, (None,), (torch.float32,), logp)
    optional = {"old_logp": old_logp, "ref_logp": ref_logp, "sampler_logp": sampler_logp}
    denominators = {"num_sequences": num_sequences, "num_tokens": num_tokens}
    check_loss_inputs(spec, logp, sequence_id, advantage, optional, denominators)
    scored = torch.ones_like(sequence_id, dtype=torch.bool)
    tokens = prepare_tokens(
        spec, sequence_id, advantage, scored, logp.dtype, old_logp, ref_logp, sampler_logp, num_sequences, num_tokens
    )
    loss, kl, low, high = _GRPOLoss.apply(logp, tokens, spec, impl)
    return make_output(spec, loss, logp.detach(), None, kl, low, high, scored)
