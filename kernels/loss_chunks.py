"""`linear_grpo_loss`, chunk by chunk: logits, their statistics, the loss of each token, and the gradient of the logits.
In Triton and in PyTorch, with the same methods.

One pass: if log-probs near the policy's are known (those of the policy that sampled), so is the log-sum-exp:
    k = z_y - that log-prob;   e_v = 2^(z_v - k);   s = sum of e;   log p_y = z_y - k - log2 s        (in bits)
    dz_v = -g/s (e_v - s 1[v = y]) / T
so a row of logits is read once and written once, as e, and -g/(s T) multiplies d_hidden's rows and, before the matmul
(one more rounding in half precision), hidden's. It is exact up to rounding as long as s is a normal number: `drifted`
says whether it left 2^-86 .. 2^86, and then the caller repeats the call without those log-probs.

Shapes: N scored tokens, n tokens of a chunk, V vocabulary, D hidden.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import triton
import triton.language as tl

from .chunked_logits import Chunk, dlogits_triton, exp_row, row_config, row_statistics, write_dlogits
from .grpo_loss import empty_evaluation, evaluate_triton, load_mismatch, load_old
from .likely_columns import LikelyColumns, likely_columns_torch, likely_columns_triton
from .loss_settings import GRPOLoss, LossFlags, LossNumbers
from .objective import Evaluation, Tokens, evaluate, sampler_ratio, token_loss
from .online_softmax import BITS_TO_NATS, LN_2, LOG2_E

MAX_DRIFT = 2.0**86  # about 60 nats
NO_TOKEN = 1e30  # offset of an ignored token: its row becomes 0


@triton.jit(
    do_not_specialize=["first"],
    do_not_specialize_on_alignment=["target_ptr", "old_ptr", "ref_ptr", "sampler_ptr"],  # the caller's, slices perhaps
)
def grpo_rows_kernel(
    logits_ptr,  # [n, V]: this chunk
    target_ptr,
    advantage_ptr,
    scale_ptr,
    scored_ptr,
    old_ptr,
    ref_ptr,
    sampler_ptr,
    offset_ptr,  # [N]
    logp_ptr,
    entropy_ptr,
    top_ptr,
    total_ptr,
    loss_ptr,
    gradient_ptr,
    kl_ptr,
    low_ptr,
    high_ptr,  # [N]
    numbers,
    first,
    V,
    stride_logits,
    inv_temperature,
    SPEC: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_SAMPLER: tl.constexpr,
    PASSES: tl.constexpr,
    STATISTICS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per token: its log-prob, entropy, loss, coefficient, and its logits' gradient in place, or, with less
    than two PASSES, what that is a multiple of. No pass: gluon_exponentials.py has made it, and its results are where
    total, entropy and log-prob will be. STATISTICS stops before the loss, which needs the other tokens of the sequence.
    """
    row = tl.program_id(0)
    token = first + row
    row_ptr = logits_ptr + row.to(tl.int64) * stride_logits
    scale = inv_temperature * LOG2_E
    scored = tl.load(scored_ptr + token) != 0
    target = tl.load(target_ptr + token)
    scored = scored & (target >= 0) & (target < V)  # whatever the id, no read outside the row
    if PASSES == 0:
        top, total = tl.load(offset_ptr + token), tl.load(total_ptr + token)
        mean, z_target = tl.load(entropy_ptr + token), tl.load(logp_ptr + token)
    else:
        z_target = tl.load(row_ptr + target, mask=scored, other=0.0).to(tl.float32)
        tl.debug_barrier()  # every thread has read the target's logit before one overwrites it
        if PASSES == 1:
            top = tl.load(offset_ptr + token)
            total, mean = exp_row(row_ptr, V, scale, top, BLOCK)
            z_target = z_target * scale - top
        else:
            top, total, mean = row_statistics(row_ptr, V, scale, BLOCK)
            z_target = (z_target - top) * scale
    tl.debug_barrier()  # the target's element was written, and its logit read, by other threads
    if PASSES < 2:
        tl.store(row_ptr + target, (tl.exp2(z_target) - total).to(row_ptr.dtype.element_ty), mask=scored)
    tl.store(top_ptr + token, top)
    tl.store(total_ptr + token, total)
    log_total = tl.log2(total)
    logp = tl.where(scored, (z_target - log_total) * BITS_TO_NATS, 0.0)
    tl.store(logp_ptr + token, logp)
    tl.store(entropy_ptr + token, tl.where(scored, (log_total - mean / total) * BITS_TO_NATS, 0.0))
    if not STATISTICS:
        old = load_old(logp, old_ptr, token, scored, HAS_OLD)
        log_ratio = logp - old
        correction = 1.0
        if HAS_SAMPLER:
            correction = sampler_ratio(load_mismatch(old, sampler_ptr, token, scored), numbers, SPEC)
        ref = logp
        if SPEC.kl:
            ref = tl.load(ref_ptr + token, mask=scored, other=0.0)
        value, d_weight, d_logp, kl, low, high = token_loss(
            logp, log_ratio, log_ratio, ref, tl.load(advantage_ptr + token), correction, numbers, SPEC
        )
        c = tl.load(scale_ptr + token)
        gradient = d_logp * c + d_weight * c
        tl.store(loss_ptr + token, value * c)
        tl.store(gradient_ptr + token, gradient)
        tl.store(kl_ptr + token, tl.where(scored, kl, 0.0))
        tl.store(low_ptr + token, low & scored)
        tl.store(high_ptr + token, high & scored)
        if PASSES == 2:
            write_dlogits(row_ptr, V, target, scored, top, log_total, 0.0, gradient, 0.0, inv_temperature, False, BLOCK)


class LossInputs(NamedTuple):
    """What the loss of a batch, or of some of its tokens, is computed from."""

    hidden: torch.Tensor
    """[N, D]"""
    weight: torch.Tensor
    """[V, D]"""
    target: torch.Tensor
    """[N]"""
    tokens: Tokens
    spec: GRPOLoss
    near: torch.Tensor | None
    """[N] log-probs near the policy's."""
    needs_grad: tuple[bool, bool]
    """Of hidden, of weight."""
    impl: str
    """triton | torch | gluon"""
    sparse_tau: float
    """0: every token is dense (sparse_gradient.py)."""

    @property
    def coupled(self) -> bool:
        """Whether a token's loss depends on the other tokens of its sequence."""
        return self.spec.couples_tokens(self.tokens.sampler is not None)

    def select(self, index: torch.Tensor) -> LossInputs:
        """Return the tokens of these ascending indices."""
        return self._replace(
            hidden=self.hidden[index],
            target=self.target[index],
            tokens=self.tokens.select(index),
            near=None if self.near is None else self.near[index],
        )


class DLogits(NamedTuple):
    """The gradient of a chunk's logits: `d` [n, V], or `factor` [n] times its rows."""

    d: torch.Tensor
    factor: torch.Tensor | None


class LossChunks(Protocol):
    """The work on a chunk of tokens."""

    logp: torch.Tensor
    """[N] fp32, as `entropy`: filled by `score`, or set by the caller."""
    entropy: torch.Tensor
    result: Evaluation
    weight: torch.Tensor
    """[V, D], as `dlogits` is to be multiplied with."""

    def score(self, a: int, b: int) -> None:
        """Compute the logits, log-prob, entropy, loss and coefficient of the tokens a .. b."""

    def evaluate_all(self) -> None:
        """Compute loss and coefficient of every token from `logp`."""

    def rescore(self, a: int, b: int) -> None:
        """Compute the logits of tokens whose log-probs and coefficients are known."""

    def likely_columns(self, a: int, b: int) -> LikelyColumns:
        """Find those of the tokens of the last call of `score` or `rescore`, before `dlogits`."""

    def dlogits(self, a: int, b: int) -> DLogits:
        """Return the gradient of the logits that the last call of `score` or `rescore` computed."""

    def drifted(self) -> bool:
        """Whether the log-probs that were taken for near were too far, so that the results are not valid."""


class _Chunks:
    """What both implementations share."""

    def __init__(self, inputs: LossInputs) -> None:
        self.hidden, self.weight, self.target = inputs.hidden, inputs.weight, inputs.target
        self.tokens, self.spec, self.inv_temperature = inputs.tokens, inputs.spec, 1.0 / inputs.spec.temperature
        self.sparse_tau = inputs.sparse_tau
        self.offset = None if inputs.near is None else self.offsets(inputs.near)
        # each of its own: a view into one tensor would be aligned for some N only, and compile a kernel for each case
        self.logp, self.entropy, self.top, self.total = (
            self.hidden.new_empty(len(self.hidden), dtype=torch.float32) for _ in range(4)
        )
        self.result = empty_evaluation(self.logp)

    def offsets(self, near: torch.Tensor) -> torch.Tensor:
        """Return [N], in bits, the log-sum-exp that these log-probs stand for."""
        z_target = self.hidden.new_empty(len(self.hidden), dtype=torch.float32)
        for x, y, out in zip(*(v.split(1024) for v in (self.hidden, self.target, z_target)), strict=True):
            out.copy_(torch.linalg.vecdot(x.float(), self.weight[y.clamp(0, len(self.weight) - 1)].float()))
        offset = (z_target * self.inv_temperature - near.float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)) / LN_2
        return torch.where(self.tokens.scored, offset, NO_TOKEN)

    def row_factor(self, a: int, b: int) -> torch.Tensor:
        g, total = self.result.gradient[a:b], self.total[a:b]
        return torch.where(g != 0, g * -self.inv_temperature / total, 0.0)

    def drifted(self) -> bool:
        if self.offset is None:
            return False
        far = (self.total > MAX_DRIFT) | (self.total < 1 / MAX_DRIFT)
        return bool((far & self.tokens.scored).any())


class TorchChunks(_Chunks):
    """In PyTorch."""

    def __init__(self, inputs: LossInputs, rows: int) -> None:
        super().__init__(inputs._replace(weight=inputs.weight.float(), target=inputs.target.clamp(min=0)))
        self.chunk = Chunk(rows, self.weight, self.inv_temperature)

    def _logits(self, a: int, b: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the logits; return log-probs and entropy."""
        hidden, target, ignored = self.hidden[a:b], self.target[a:b], ~self.tokens.scored[a:b]
        if self.offset is None:
            logp, entropy = self.chunk(hidden, target)
            assert entropy is not None
        else:
            logp, entropy = self.chunk.one_pass(hidden, target, self.offset[a:b])
            self.total[a:b] = self.chunk.total
        return logp.masked_fill_(ignored, 0.0), entropy.masked_fill_(ignored, 0.0)

    def score(self, a: int, b: int) -> None:
        self.logp[a:b], self.entropy[a:b] = self._logits(a, b)
        part = evaluate(self.logp[a:b], self.tokens.slice(a, b), self.spec)
        for whole, field in zip(self.result, part, strict=True):
            whole[a:b] = field

    def evaluate_all(self) -> None:
        self.result = evaluate(self.logp, self.tokens, self.spec)

    def rescore(self, a: int, b: int) -> None:
        self._logits(a, b)

    def likely_columns(self, a: int, b: int) -> LikelyColumns:
        live = self.result.gradient[a:b] != 0
        e, scratch = (x[: b - a] for x in (self.chunk.exp, self.chunk.logits))
        return likely_columns_torch(e, self.chunk.total, self.target[a:b], live, self.sparse_tau, scratch)

    def dlogits(self, a: int, b: int) -> DLogits:
        if self.offset is None:
            return DLogits(self.chunk.dlogits(self.result.gradient[a:b], self.target[a:b]), None)
        return DLogits(self.chunk.exp[: b - a], self.row_factor(a, b))


class TritonChunks(_Chunks):
    """In Triton and cuBLAS."""

    def __init__(self, inputs: LossInputs, rows: int) -> None:
        super().__init__(inputs)
        # likely columns are found in raw logits, or in what one pass leaves
        self.statistics_first = inputs.coupled or (inputs.sparse_tau > 0 and self.offset is None)
        self.passes = 2 if self.offset is None else 0 if inputs.impl == "gluon" else 1
        self.buffer = self.weight.new_empty(rows, len(self.weight))
        self.is_gradient = False  # whether the buffer holds the gradient, or raw logits

    def _rows(self, a: int, b: int, logp: torch.Tensor, entropy: torch.Tensor, statistics: bool) -> None:
        t, logits = self.tokens, self.buffer[: b - a]
        if self.passes == 0:
            self._exponentials(a, b, logp, entropy)
        else:
            torch.mm(self.hidden[a:b], self.weight.t(), out=logits)
        old, ref, sampler, offset = (self.logp if x is None else x for x in (t.old, t.ref, t.sampler, self.offset))
        has_sampler = t.sampler is not None
        grpo_rows_kernel[(b - a,)](
            logits,
            self.target,
            t.advantage,
            t.scale,
            t.scored,
            old,
            ref,
            sampler,
            offset,
            logp,
            entropy,
            self.top,
            self.total,
            *self.result,
            LossNumbers.of(self.spec),
            a,
            logits.shape[1],
            logits.stride(0),
            self.inv_temperature,
            LossFlags.of(self.spec, has_sampler),
            t.old is not None,
            has_sampler,
            self.passes,
            statistics,
            **row_config(logits),
        )
        self.is_gradient = not statistics and self.offset is None

    def _exponentials(self, a: int, b: int, logp: torch.Tensor, entropy: torch.Tensor) -> None:
        """Compute the exponentials of the logits, and what `grpo_rows_kernel` without a pass reads."""
        from .gluon_exponentials import fill_exponentials

        assert self.offset is not None
        rows = (self.hidden[a:b], self.weight, self.target[a:b], self.offset[a:b], self.inv_temperature)
        sums = fill_exponentials(*rows, result=self.buffer[: b - a])
        for out, x in zip((self.total, entropy, logp), sums, strict=True):
            out[a:b] = x

    def score(self, a: int, b: int) -> None:
        self._rows(a, b, self.logp, self.entropy, self.statistics_first)
        if self.statistics_first:
            evaluate_triton(self.logp, self.tokens, self.spec, self.result, a, b)

    def evaluate_all(self) -> None:
        evaluate_triton(self.logp, self.tokens, self.spec, self.result, 0, len(self.logp))

    def rescore(self, a: int, b: int) -> None:
        unused = torch.empty_like(self.logp)
        self._rows(a, b, unused, unused, statistics=True)

    def likely_columns(self, a: int, b: int) -> LikelyColumns:
        statistics = (self.result.gradient, self.top, self.total)
        options = (self.inv_temperature, self.sparse_tau, self.offset is None)
        return likely_columns_triton(self.buffer[: b - a], a, self.target, *statistics, *options)

    def dlogits(self, a: int, b: int) -> DLogits:
        d = self.buffer[: b - a]
        if self.offset is not None:
            return DLogits(d, self.row_factor(a, b))
        if not self.is_gradient:
            dlogits_triton(
                d, a, self.target, self.result.gradient, self.inv_temperature, statistics=(self.top, self.total)
            )
        return DLogits(d, None)
