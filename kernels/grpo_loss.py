"""Log-probs -> GRPO loss, every loss type (the mathematics: objective.py).

    loss = sum over t of c_t l_t(logp_t, old_t, ref_t, sampler_t, A_s);   gradient d loss / d logp [N]

Both are made in the forward pass, so the backward is one multiply by the incoming gradient.
Bytes: at most 4 fp32 reads and 3 writes a token, no FLOPs to speak of: launch bound below a million tokens.
Tolerance: fp32 within 1e-5 of float64.   Measured on a GPU: not yet.

Shapes: N scored tokens, S sequences.
"""

import torch

from .checks import (
    REFERENCE_FLOATS,
    check_denominator,
    check_sequences,
    check_tensor,
    choose_impl,
    require,
)
from .objective import (
    GRPOLoss,
    GRPOLossOutput,
    Tokens,
    describe_tokens,
    evaluate,
)

__all__ = ["GRPOLoss", "GRPOLossOutput", "grpo_loss"]


def check_loss_inputs(spec, like, sequence_id, advantage, optional, denominators) -> None:
    """The checks that `grpo_loss` and `linear_grpo_loss` share; `like` is the [N, ...] tensor."""
    require(isinstance(spec, GRPOLoss), "spec", f"expected a GRPOLoss, got {type(spec).__name__}")
    check_sequences(sequence_id, advantage, like)
    for name, x in optional.items():
        if x is not None:
            check_tensor(name, x, (like.shape[0],), REFERENCE_FLOATS, like)
    for name, value in denominators.items():
        check_denominator(name, value)
    missing = spec.beta != 0 and optional["ref_logp"] is None
    require(not missing, "ref_logp", f"needed, because beta is {spec.beta}")


def output_of(
    spec: GRPOLoss, loss: torch.Tensor, logp: torch.Tensor, entropy: torch.Tensor | None,
    kl: torch.Tensor, clip_low: torch.Tensor, clip_high: torch.Tensor, scored: torch.Tensor,
) -> GRPOLossOutput:  # fmt: skip
    total = scored.sum().clamp(min=1)
    low, high = (clipped.sum() / total for clipped in (clip_low, clip_high))
    return GRPOLossOutput(loss, logp, entropy, kl if spec.beta != 0 else None, low, high)


class _GRPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logp: torch.Tensor, tokens: Tokens, spec: GRPOLoss, impl: str):
        result = evaluate(logp, tokens, spec)
        ctx.save_for_backward(result.gradient)
        ctx.mark_non_differentiable(*result[2:])
        return result.loss.sum(), *result[2:]

    @staticmethod
    def backward(ctx, grad_loss: torch.Tensor, *_):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss, None, None, None


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
    """GRPO loss of log-probs that some other op made; differentiable in `logp`.

    Args:
        logp: [N] fp32 log-probs of the scored tokens under the policy.
        sequence_id: [N] int, non-decreasing; which entry of `advantage` a token belongs to.
        advantage: [S].
        spec: the loss.
        old_logp: [N] behaviour policy; None = on-policy (importance 1, with its gradient).
        ref_logp: [N] reference model; needed when `spec.beta` > 0.
        sampler_logp: [N] what the sampler reported; corrects for its drift from `old_logp`.
        num_sequences, num_tokens: denominators over all micro-batches and ranks (default: local).
        impl: auto | triton | torch | reference.
    """
    impl = choose_impl(impl, logp)
    if impl == "reference":
        from . import reference

        return reference.grpo_loss(
            logp, sequence_id, advantage, spec=spec, old_logp=old_logp, ref_logp=ref_logp,
            sampler_logp=sampler_logp, num_sequences=num_sequences, num_tokens=num_tokens,
        )  # fmt: skip
    check_tensor("logp", logp, (None,), (torch.float32,), logp)
    optional = {"old_logp": old_logp, "ref_logp": ref_logp, "sampler_logp": sampler_logp}
    denominators = {"num_sequences": num_sequences, "num_tokens": num_tokens}
    check_loss_inputs(spec, logp, sequence_id, advantage, optional, denominators)
    scored = torch.ones_like(sequence_id, dtype=torch.bool)
    tokens = describe_tokens(
        spec, sequence_id, advantage, scored, logp.dtype, old_logp,
        ref_logp if spec.beta != 0 else None, sampler_logp, num_sequences, num_tokens,
    )  # fmt: skip
    loss, kl, low, high = _GRPOLoss.apply(logp, tokens, spec, impl)
    return output_of(spec, loss, logp.detach(), None, kl, low, high, scored)
