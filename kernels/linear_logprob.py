"""lm_head matmul + log-softmax + gather (+ entropy): per-token log-probs without the [N, V] logits.

    z = hidden W^T / T;   logp_n = z_n,y - lse_n;   H_n = lse_n - sum over v of p_nv z_nv
    d z_nv = g_n (1[v = y] - p_nv) - h_n p_nv (log p_nv + H_n)        g, h: incoming gradients

The general op: its gradient is not known in the forward pass, so the backward recomputes the logits, four
vocabulary matmuls in all. `linear_grpo_loss` needs three. FLOPs 2NVD a matmul.
Tolerance: fp32 within 1e-5 of float64; bf16 error not above plain PyTorch bf16's.
Measured on a GPU: not yet.

Shapes: N scored tokens, V vocabulary, D hidden.
"""

from collections.abc import Iterator

import torch

from .checks import IGNORED, check_head, check_target, check_temperature, choose_impl

CHUNK_BYTES = 1 << 25  # of fp32 logits at a time on the CPU: small problems run as one chunk


def chunk_rows(V: int) -> int:
    """Tokens whose logits exist at once; below 32 a chunk's pass over dW would cost more than its matmul."""
    return max(32, CHUNK_BYTES // (4 * V))


def row_spans(N: int, rows: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + rows, N)) for start in range(0, N, rows))


class Chunk:
    """The two [rows, V] buffers of the CPU path, and the softmax statistics of one chunk of tokens."""

    def __init__(self, rows: int, weight: torch.Tensor):
        self.weight = weight
        self.logits = weight.new_empty(rows, weight.shape[0])
        self.softmax = torch.empty_like(self.logits)

    def __call__(self, hidden: torch.Tensor, target: torch.Tensor, entropy: bool = True) -> tuple:
        """-> logp, entropy | None, lse, softmax (a view that the next call overwrites)."""
        n = hidden.shape[0]
        z = torch.mm(hidden, self.weight.t(), out=self.logits[:n])
        p = torch.softmax(z, 1, out=self.softmax[:n])
        lse = z.amax(1) - p.amax(1).log_()  # the largest p is 1 / sum(e^(z - max)), accurately
        logp = z.gather(1, target[:, None])[:, 0] - lse
        if not entropy:
            return logp, None, lse, p
        # one pass over both, no temporary; p = 0 times a finite z adds nothing, so no -inf appears
        mean = torch.bmm(p[:, None], z[:, :, None])[:, 0, 0]
        return logp, lse - mean, lse, p


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, inv_temperature: float, entropy: bool, impl: str):
        scored = target != IGNORED
        chunk = Chunk(min(chunk_rows(weight.shape[0]), hidden.shape[0]), weight.float())
        safe = target.clamp(min=0)
        logp = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        ent = torch.empty_like(logp) if entropy else None
        for a, b in row_spans(len(hidden), chunk_rows(weight.shape[0])):
            logp[a:b], h, *_ = chunk(hidden[a:b].float() * inv_temperature, safe[a:b], entropy)
            if entropy:
                ent[a:b] = h
        logp.masked_fill_(~scored, 0.0)
        if entropy:
            ent.masked_fill_(~scored, 0.0)
        ctx.save_for_backward(hidden, weight, safe, scored, ent)
        ctx.inv_temperature = inv_temperature
        ctx.set_materialize_grads(False)
        return logp, ent

    @staticmethod
    def backward(ctx, grad_logp, grad_entropy):
        hidden, weight, safe, scored, ent = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        rows, w, inv_t = chunk_rows(weight.shape[0]), weight.float(), ctx.inv_temperature
        chunk = Chunk(min(rows, hidden.shape[0]), w)
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(w) if need_weight else None
        zero = torch.zeros_like(scored, dtype=torch.float32)
        g = zero if grad_logp is None else (grad_logp * scored)
        h = None if grad_entropy is None else (grad_entropy * scored)
        for a, b in row_spans(len(hidden), rows):
            x = hidden[a:b].float() * inv_t
            _, _, lse, p = chunk(x, safe[a:b], entropy=False)
            if h is None:
                p.mul_(-g[a:b, None])
            else:  # p (-g - h (z - lse + H))
                z = chunk.logits[: b - a]
                z.add_((ent[a:b] - lse)[:, None]).mul_(-h[a:b, None]).sub_(g[a:b, None])
                p.mul_(z)
            p.scatter_add_(1, safe[a:b, None], g[a:b, None])
            if need_hidden:
                d_hidden[a:b] = (p @ w).mul_(inv_t)
            if need_weight:
                d_weight.addmm_(p.t(), x)
        d_weight = d_weight.to(weight.dtype) if need_weight else None
        return d_hidden, d_weight, None, None, None, None


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each target under softmax(hidden @ weight.T / temperature); differentiable.

    Args:
        hidden: [N, D] bf16, fp16 or fp32.
        weight: [V, D], the lm_head, same dtype. Frozen (or tied to an embedding) is fine.
        target: [N] int64; -100 = ignored: log-prob 0, no gradient.
        temperature: divides the logits.
        entropy: also return the entropy of the softmax, differentiable as well.
        impl: auto | triton | torch | reference.

    Returns:
        logp [N] fp32, or (logp, entropy [N] fp32).
    """
    impl = choose_impl(impl, hidden)
    check_head(hidden, weight, impl)
    check_target(target, hidden, weight.shape[0])
    check_temperature(temperature)
    if impl == "reference":
        from . import reference

        return reference.linear_logprob(
            hidden, weight, target, temperature=temperature, entropy=entropy
        )
    logp, ent = _LinearLogprob.apply(hidden, weight, target, 1.0 / temperature, entropy, impl)
    return (logp, ent) if entropy else logp
