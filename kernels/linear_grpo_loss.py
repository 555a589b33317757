"""Hidden states -> GRPO loss, with the gradients made in the forward pass: three vocabulary matmuls.

For every chunk of tokens:
    z = hidden W^T / T                                     matmul 1
    lse, logp, entropy, loss, coefficient g = d loss/d logp    one pass over the rows (objective.py)
    dz = g (1_y - p)                                       in place
    d_hidden = dz W / T;   d_weight += dz^T hidden / T     matmuls 2 and 3, d_weight summed in fp32

The loss is a scalar, so the backward only multiplies by the incoming gradient. Rows with g = 0 (ignored,
clipped, no advantage and beta 0) skip matmuls 2 and 3; a frozen weight skips 3, no_grad skips both.
If tokens depend on their whole sequence (GSPO, vespo, sequence-level sampler correction) chunks end on
sequence borders; a sequence longer than a chunk is scored first by a fourth matmul.

FLOPs 6NVD; the floor at N = 5,600, V = 151,936, D = 1,536: 7.84 TFLOP = 11.2 ms at 700 TF/s. Memory: one
chunk of logits and the fp32 d_weight.
Tolerance: fp32 within 1e-5 of float64; bf16 error not above plain PyTorch bf16's.
Measured on a GPU: not yet.

Shapes: N scored tokens, V vocabulary, D hidden, S sequences.
"""

import torch

from .checks import IGNORED, check_head, check_target, choose_impl
from .grpo_loss import check_loss_inputs, output_of
from .linear_logprob import Chunk, chunk_rows, linear_logprob, row_spans
from .objective import Evaluation, GRPOLoss, GRPOLossOutput, Tokens, describe_tokens, evaluate

WORTH_COMPACTING = 0.9  # share of rows with a gradient below which copying them out is cheaper


def _spans(tokens: Tokens, rows: int, whole_sequences: bool) -> list[tuple[int, int]] | None:
    """Chunks of at most `rows` tokens; None if a sequence that must stay whole is longer."""
    N = tokens.scored.shape[0]
    if not whole_sequences or rows >= N:
        return list(row_spans(N, rows))
    ids = tokens.sequence_id
    borders = [*(torch.nonzero(ids[1:] != ids[:-1])[:, 0] + 1).tolist(), N]
    spans, start, end = [], 0, 0
    for border in borders:
        if border - start > rows:
            if end > start:
                spans.append((start, end))
                start = end
            if border - start > rows:
                return None
        end = border
    return [*spans, (start, end)]


def _torch_forward(hidden, weight, target, tokens: Tokens, spec: GRPOLoss, need: tuple[bool, bool]):
    need_hidden, need_weight = need
    N, inv_t = hidden.shape[0], 1.0 / spec.temperature
    w, safe = weight.float(), target.clamp(min=0)
    rows = chunk_rows(w.shape[0])
    spans = _spans(tokens, rows, spec.couples_tokens(tokens.sampler is not None))
    known = None
    if spans is None:
        logp = linear_logprob(hidden, weight, target, temperature=spec.temperature, impl="torch")
        known = evaluate(logp, tokens, spec)
        spans = list(row_spans(N, rows))
    chunk = Chunk(min(rows, N), w)
    logp, entropy = w.new_empty(2, N)
    d_hidden = torch.zeros_like(hidden) if need_hidden else None
    d_weight = torch.zeros_like(w) if need_weight else None
    parts = []
    for a, b in spans:
        x = hidden[a:b].float() * inv_t
        logp[a:b], entropy[a:b], _, p = chunk(x, safe[a:b])
        logp[a:b].masked_fill_(~tokens.scored[a:b], 0.0)
        entropy[a:b].masked_fill_(~tokens.scored[a:b], 0.0)
        if known is None:
            parts.append(evaluate(logp[a:b], tokens.slice(a, b), spec))
            g = parts[-1].gradient
        else:
            g = known.gradient[a:b]
        if not (need_hidden or need_weight):
            continue
        live = g.nonzero()[:, 0]
        if len(live) == 0:
            continue
        p.scatter_add_(1, safe[a:b, None], p.new_full((b - a, 1), -1.0))  # p - 1_y
        out = slice(a, b)
        if len(live) < WORTH_COMPACTING * (b - a):
            p, x, g, out = p[live], x[live], g[live], live + a
        g = g[:, None]
        if need_hidden:
            d_hidden[out] = (p @ w).mul_(g * -inv_t).to(hidden.dtype)
        if need_weight:
            d_weight.addmm_(p.t(), x.mul_(g), alpha=-1.0)
    if known is None:
        parts = parts or [evaluate(logp, tokens, spec)]  # no tokens at all
        known = Evaluation(*(torch.cat(field) for field in zip(*parts, strict=True)))
    return known, logp, entropy, d_hidden, d_weight


class _LinearGRPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, tokens: Tokens, spec: GRPOLoss, need, impl: str):
        e, logp, entropy, d_hidden, d_weight = _torch_forward(
            hidden, weight, target, tokens, spec, need
        )
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtype = hidden.dtype
        rest = (logp, entropy, e.kl, e.clip_low, e.clip_high)
        ctx.mark_non_differentiable(*rest)
        return e.loss.sum(), *rest

    @staticmethod
    def backward(ctx, grad_loss: torch.Tensor, *_):
        scaled = (
            None if d is None else torch.mul(d, grad_loss, out=torch.empty_like(d, dtype=ctx.dtype))
            for d in ctx.saved_tensors
        )
        return *scaled, None, None, None, None, None


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
    num_sequences: int | float | torch.Tensor | None = None,
    num_tokens: int | float | torch.Tensor | None = None,
    impl: str = "auto",
) -> GRPOLossOutput:
    """GRPO loss of the tokens that `hidden` predicts; differentiable in `hidden` and `weight`.

    Args:
        hidden: [N, D] bf16, fp16 or fp32.
        weight: [V, D], the lm_head, same dtype. Frozen (or tied to an embedding) is fine.
        target: [N] int64; -100 = ignored.
        sequence_id: [N] int, non-decreasing; which entry of `advantage` a token belongs to.
        advantage: [S].
        spec: the loss, and the temperature of the softmax.
        old_logp, ref_logp, sampler_logp, num_sequences, num_tokens: as in `grpo_loss`.
        impl: auto | triton | torch | reference.
    """
    impl = choose_impl(impl, hidden)
    if impl == "reference":
        from . import reference

        return reference.linear_grpo_loss(
            hidden, weight, target, sequence_id, advantage, spec=spec, old_logp=old_logp,
            ref_logp=ref_logp, sampler_logp=sampler_logp, num_sequences=num_sequences,
            num_tokens=num_tokens,
        )  # fmt: skip
    check_head(hidden, weight, impl)
    check_target(target, hidden, weight.shape[0])
    optional = {"old_logp": old_logp, "ref_logp": ref_logp, "sampler_logp": sampler_logp}
    denominators = {"num_sequences": num_sequences, "num_tokens": num_tokens}
    check_loss_inputs(spec, hidden, sequence_id, advantage, optional, denominators)
    scored = target != IGNORED
    tokens = describe_tokens(
        spec, sequence_id, advantage, scored, torch.float32, old_logp,
        ref_logp if spec.beta != 0 else None, sampler_logp, num_sequences, num_tokens,
    )  # fmt: skip
    recording = torch.is_grad_enabled()
    need = (recording and hidden.requires_grad, recording and weight.requires_grad)
    loss, *rest = _LinearGRPOLoss.apply(hidden, weight, target, tokens, spec, need, impl)
    return output_of(spec, loss, *rest, scored)
