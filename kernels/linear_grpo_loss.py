"""Hidden states -> GRPO loss, with the gradients computed in the forward pass: three vocabulary matmuls.

For every chunk of tokens:
    z = hidden W^T / T                                     matmul 1
    lse, logp, entropy, loss, coefficient g = d loss/d logp    one pass over the rows (objective.py)
    dz = g (1_y - p)                                       in place
    d_hidden = dz W / T;   d_weight += dz^T hidden / T     matmuls 2 and 3, d_weight summed in fp32

The loss is a scalar, so the backward only multiplies by the incoming gradient. Rows with g = 0 (ignored,
clipped, no advantage and beta 0) skip matmuls 2 and 3; a frozen weight skips 3, no_grad skips both.
If tokens depend on their whole sequence (GSPO, vespo, sequence-level sampler correction) chunks end on
sequence borders; if a sequence is longer than a chunk, log-probs come first, by a fourth matmul.

FLOPs 6NVD; the floor at N = 5,600, V = 151,936, D = 1,536: 7.84 TFLOP = 11.2 ms at 700 TF/s. Memory: one
chunk of logits and the fp32 d_weight.
Tolerance: fp32 within 1e-5 of float64; bf16 error not above plain PyTorch bf16's.
Measured on a GPU: not yet.

Shapes: N scored tokens, V vocabulary, D hidden, S sequences.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .checks import IGNORE_INDEX, check_head, check_target, choose_impl, op_scope
from .chunked_logits import (
    Chunk,
    add_matmul,
    chunk_rows,
    dlogits_triton,
    matmul_over_vocabulary,
    row_config,
    row_spans,
    row_statistics,
    write_dlogits,
)
from .grpo_loss import empty_evaluation, evaluate_triton, load_mismatch, load_old
from .linear_logprob import linear_logprob
from .objective import (
    GRPOLoss,
    GRPOLossOutput,
    Tokens,
    check_loss_inputs,
    evaluate,
    make_output,
    prepare_tokens,
    sampler_ratio,
    token_loss,
)

COMPACT_BELOW = 0.9  # share of rows with a gradient below which compacting them is cheaper
COMPACT_ROWS = 128  # rows that are copied at a time


@triton.jit
def grpo_rows_kernel(
    logits_ptr,
    target_ptr,  # [n, V], [n]: this chunk
    advantage_ptr,
    scale_ptr,
    scored_ptr,
    old_ptr,
    ref_ptr,
    sampler_ptr,  # [N]
    logp_ptr,
    entropy_ptr,
    loss_ptr,
    gradient_ptr,
    kl_ptr,
    low_ptr,
    high_ptr,  # [N]
    first,
    V,
    stride_logits,
    inv_temperature,
    SPEC: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_SAMPLER: tl.constexpr,
    STATISTICS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per token: its log-prob, entropy, loss, coefficient, and its logits' gradient in place.
    STATISTICS stops after log-prob and entropy: the loss needs the other tokens of the sequence."""
    row = tl.program_id(0)
    token = first + row
    row_ptr = logits_ptr + row.to(tl.int64) * stride_logits
    top, total, mean = row_statistics(row_ptr, V, inv_temperature, BLOCK)
    log_total = tl.log(total)
    scored = tl.load(scored_ptr + token) != 0
    target = tl.load(target_ptr + row)
    in_row = scored & (target >= 0) & (target < V)  # whatever the id, no read outside the row
    z_target = tl.load(row_ptr + target, mask=in_row, other=0.0).to(tl.float32) * inv_temperature
    logp = tl.where(scored, (z_target - top) - log_total, 0.0)
    tl.store(logp_ptr + token, logp)
    tl.store(entropy_ptr + token, tl.where(scored, log_total - mean / total, 0.0))
    if not STATISTICS:
        old = load_old(logp, old_ptr, token, scored, HAS_OLD)
        log_ratio = logp - old
        correction = 1.0
        if HAS_SAMPLER:
            correction = sampler_ratio(load_mismatch(old, sampler_ptr, token, scored), SPEC)
        ref = logp
        if SPEC.beta != 0.0:
            ref = tl.load(ref_ptr + token, mask=scored, other=0.0)
        value, d_weight, d_logp, kl, low, high = token_loss(
            logp, log_ratio, log_ratio, ref, tl.load(advantage_ptr + token), correction, SPEC
        )
        scale = tl.load(scale_ptr + token)
        gradient = d_logp * scale + d_weight * scale
        tl.store(loss_ptr + token, value * scale)
        tl.store(gradient_ptr + token, gradient)
        tl.store(kl_ptr + token, tl.where(scored, kl, 0.0))
        tl.store(low_ptr + token, low & scored)
        tl.store(high_ptr + token, high & scored)
        tl.debug_barrier()  # the target's logit is read before it is overwritten
        write_dlogits(row_ptr, V, target, top, log_total, 0.0, gradient, 0.0, inv_temperature, False, BLOCK)


def _spans(tokens: Tokens, rows: int, whole_sequences: bool) -> list[tuple[int, int]] | None:
    """Return chunks of at most `rows` tokens; None if a sequence that must stay whole is longer."""
    N = tokens.scored.shape[0]
    if not whole_sequences or rows >= N:
        return list(row_spans(N, rows))
    ids = tokens.sequence_id
    ends = [*(torch.nonzero(ids[1:] != ids[:-1])[:, 0] + 1).tolist(), N]
    spans, start, end = [], 0, 0
    for next_end in ends:
        if next_end - start > rows:
            if end > start:
                spans.append((start, end))
                start = end
            if next_end - start > rows:
                return None
        end = next_end
    return [*spans, (start, end)]


def compact_rows(d: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Move the rows `keep` (ascending) to the front, in place: a copy of the chunk would double its memory."""
    for start in range(0, len(keep), COMPACT_ROWS):
        part = keep[start : start + COMPACT_ROWS]
        d[start : start + len(part)] = d[part]  # rows still to come lie further back
    return d[: len(keep)]


class _TorchChunks:
    """The work on a chunk of tokens, in PyTorch."""

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        tokens: Tokens,
        spec: GRPOLoss,
        rows: int,
    ) -> None:
        self.hidden, self.weight, self.tokens, self.spec = hidden, weight.float(), tokens, spec
        self.target = target.clamp(min=0)
        self.chunk = Chunk(rows, self.weight, 1.0 / spec.temperature)
        self.logp, self.entropy = self.weight.new_empty(2, len(hidden))
        self.result = empty_evaluation(self.logp)

    def score(self, a: int, b: int) -> None:
        """Compute log-prob, entropy, loss and coefficient of the tokens a .. b."""
        logp, entropy = self.chunk(self.hidden[a:b], self.target[a:b])
        assert entropy is not None
        ignored = ~self.tokens.scored[a:b]
        self.logp[a:b] = logp.masked_fill_(ignored, 0.0)
        self.entropy[a:b] = entropy.masked_fill_(ignored, 0.0)
        part = evaluate(logp, self.tokens.slice(a, b), self.spec)
        for whole, field in zip(self.result, part, strict=True):
            whole[a:b] = field

    def evaluate_all(self) -> None:
        self.result = evaluate(self.logp, self.tokens, self.spec)

    def rescore(self, a: int, b: int) -> None:
        """Recompute the logits of tokens whose coefficient is known."""
        self.chunk(self.hidden[a:b], self.target[a:b], entropy=False)

    def dlogits(self, a: int, b: int) -> tuple[torch.Tensor, slice | torch.Tensor]:
        """Return the logits' gradient of the tokens that have one, and which tokens these are."""
        g = self.result.gradient[a:b]
        keep = g.nonzero()[:, 0]
        if len(keep) < COMPACT_BELOW * (b - a):
            return self.chunk.dlogits(g, self.target[a:b], rows=keep), keep + a
        return self.chunk.dlogits(g, self.target[a:b]), slice(a, b)


class _TritonChunks:
    """The same in Triton."""

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        tokens: Tokens,
        spec: GRPOLoss,
        rows: int,
    ) -> None:
        self.hidden, self.weight, self.target = hidden, weight, target
        self.tokens, self.spec, self.inv_temperature = tokens, spec, 1.0 / spec.temperature
        self.coupled = spec.couples_tokens(tokens.sampler is not None)
        self.buffer = weight.new_empty(rows, weight.shape[0])
        self.logp, self.entropy = hidden.new_empty(2, len(hidden), dtype=torch.float32)
        self.result = empty_evaluation(self.logp)
        self.is_gradient = False  # the buffer holds raw logits, or already their gradient
        # with a KL every scored token has a gradient: no search for them, so no sync per chunk
        self.may_compact = spec.beta == 0 or not bool(tokens.scored.all())

    def score(self, a: int, b: int) -> None:
        t, logits = self.tokens, self.buffer[: b - a]
        torch.mm(self.hidden[a:b], self.weight.t(), out=logits)
        old, ref, sampler = (self.logp if x is None else x for x in (t.old, t.ref, t.sampler))
        grpo_rows_kernel[(b - a,)](
            logits,
            self.target[a:b],
            t.advantage,
            t.scale,
            t.scored,
            old,
            ref,
            sampler,
            self.logp,
            self.entropy,
            *self.result,
            a,
            logits.shape[1],
            logits.stride(0),
            self.inv_temperature,
            self.spec,
            t.old is not None,
            t.sampler is not None,
            self.coupled,
            **row_config(logits.shape[1]),
        )
        self.is_gradient = not self.coupled
        if self.coupled:
            evaluate_triton(self.logp, t, self.spec, self.result, a, b)

    def evaluate_all(self) -> None:
        evaluate_triton(self.logp, self.tokens, self.spec, self.result, 0, len(self.logp))

    def rescore(self, a: int, b: int) -> None:
        torch.mm(self.hidden[a:b], self.weight.t(), out=self.buffer[: b - a])
        self.is_gradient = False

    def dlogits(self, a: int, b: int) -> tuple[torch.Tensor, slice | torch.Tensor]:
        d, g = self.buffer[: b - a], self.result.gradient[a:b]
        if not self.is_gradient:
            dlogits_triton(d, self.target[a:b], g, None, self.inv_temperature)
        if self.may_compact:
            keep = g.nonzero()[:, 0]
            if len(keep) < COMPACT_BELOW * (b - a):
                return compact_rows(d, keep), keep + a
        return d, slice(a, b)


def _forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    tokens: Tokens,
    spec: GRPOLoss,
    needs_grad: tuple[bool, bool],
    impl: str,
) -> tuple[_TritonChunks | _TorchChunks, torch.Tensor | None, torch.Tensor | None]:
    """Return the chunks with their results, d_hidden, and d_weight in fp32. `needs_grad`: of hidden, of weight."""
    N = len(hidden)
    rows = chunk_rows(N, weight.shape[0], weight.element_size(), weight.device.type)
    spans = _spans(tokens, rows, spec.couples_tokens(tokens.sampler is not None))
    score_first = spans is None or not any(needs_grad)
    make_chunks = _TritonChunks if impl == "triton" else _TorchChunks
    chunks = make_chunks(hidden, weight, target, tokens, spec, rows if any(needs_grad) else 0)
    if score_first:
        with torch.no_grad():
            chunks.logp, chunks.entropy = linear_logprob(
                hidden, weight, target, temperature=spec.temperature, entropy=True, impl=impl
            )
        chunks.evaluate_all()
    d_hidden = torch.zeros_like(hidden) if needs_grad[0] else None
    d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad[1] else None
    if not any(needs_grad):
        return chunks, d_hidden, d_weight
    for a, b in spans or row_spans(N, rows):
        if score_first:
            chunks.rescore(a, b)
        else:
            chunks.score(a, b)
        d, live = chunks.dlogits(a, b)
        if d_hidden is not None:
            d_hidden[live] = matmul_over_vocabulary(d, chunks.weight).to(hidden.dtype)
        if d_weight is not None:
            add_matmul(d_weight, d.t(), hidden[live])
    return chunks, d_hidden, d_weight


class _LinearGRPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, tokens: Tokens, spec: GRPOLoss, needs_grad, impl: str):
        chunks, d_hidden, d_weight = _forward(hidden, weight, target, tokens, spec, needs_grad, impl)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtype = hidden.dtype
        result = chunks.result
        rest = (chunks.logp, chunks.entropy, result.kl, result.clip_low, result.clip_high)
        ctx.mark_non_differentiable(*rest)
        return result.loss.sum(), *rest

    @staticmethod
    @once_differentiable
    @op_scope
    def backward(ctx, grad_loss: torch.Tensor, *_):
        scaled = (
            None if d is None else torch.mul(d, grad_loss, out=torch.empty_like(d, dtype=ctx.dtype))
            for d in ctx.saved_tensors
        )
        return *scaled, None, None, None, None, None


@op_scope
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
        num_sequences: denominator.
        num_tokens: denominator.
        impl: auto | triton | torch | reference.
    """
    impl = choose_impl(impl, hidden)
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
            num_sequences=num_sequences,
            num_tokens=num_tokens,
        )
    check_head(hidden, weight, impl)
    check_target(target, hidden, weight.shape[0])
    optional = {"old_logp": old_logp, "ref_logp": ref_logp, "sampler_logp": sampler_logp}
    denominators = {"num_sequences": num_sequences, "num_tokens": num_tokens}
    check_loss_inputs(spec, hidden, sequence_id, advantage, optional, denominators)
    scored = target != IGNORE_INDEX
    tokens = prepare_tokens(
        spec, sequence_id, advantage, scored, torch.float32, old_logp, ref_logp, sampler_logp, num_sequences, num_tokens
    )
    if impl == "triton":
        hidden, weight, target = hidden.contiguous(), weight.contiguous(), target.contiguous()
    recording = torch.is_grad_enabled()
    needs_grad = (recording and hidden.requires_grad, recording and weight.requires_grad)
    loss, logp, entropy, kl, low, high = _LinearGRPOLoss.apply(hidden, weight, target, tokens, spec, needs_grad, impl)
    return make_output(spec, loss, logp, entropy, kl, low, high, scored)
