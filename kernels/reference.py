"""Every op in plain PyTorch, with full [N, V] logits: the same names, and the same arguments but `impl`.

The oracle of the tests (in float64) and a baseline of the benches, so it is simple rather than fast. The loss value
comes from objective.py like the other implementations', but its gradient is autograd's.

Shapes: N scored tokens, V vocabulary, D hidden, S sequences, R rows, G group.
"""

import torch
from torch.nn.functional import silu

from .checks import (
    IGNORE_INDEX,
    check_head,
    check_norm,
    check_reward,
    check_rope,
    check_rows,
    check_share,
    check_target,
    check_temperature,
)
from .likely_columns import BLOCK_ROWS, MOST_COLUMNS, THRESHOLD
from .loss_settings import GRPOLoss
from .objective import Evaluation, GRPOLossOutput, Tokens, check_loss_inputs, evaluate, make_output, prepare_tokens
from .page_table import Pages
from .sampling_noise import exponential_noise, seed_tensor
from .sparse_gradient import SparseTokens


def _logits(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return [N, V] in fp32 (float64 for float64), rounded to the inputs' dtype as an `nn.Linear` would."""
    logits = hidden @ weight.t()
    return (logits if logits.dtype == torch.float64 else logits.float()) / temperature


def linear_logprob(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, *, temperature: float = 1.0, entropy: bool = False
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    check_head(hidden, weight, "reference")
    check_target(target, hidden, weight.shape[0])
    check_temperature(temperature)
    logp, h = _scores(_logits(hidden, weight, temperature), target)
    return (logp, h) if entropy else logp


def _scores(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [N] log-probs and entropies, 0 where ignored."""
    scored = target != IGNORE_INDEX
    log_p = torch.log_softmax(logits, dim=-1)
    logp = log_p.gather(1, target.clamp(min=0)[:, None])[:, 0]
    return torch.where(scored, logp, 0.0), torch.where(scored, -(log_p.exp() * log_p).sum(1), 0.0)


def group_advantage(reward: torch.Tensor, group_size: int, *, scale: str = "group", eps: float = 1e-4) -> torch.Tensor:
    check_reward(reward, group_size, scale, eps)
    r = reward.double().view(-1, group_size)  # a mean in fp32 would cost digits
    d = r - r[:, :1]  # equal rewards: exactly 0, and so are their mean and deviation
    centred, divisor = d - d.mean(1, keepdim=True), r.new_ones(())
    if scale == "group" and group_size > 1 and r.numel():
        divisor = d.std(1, keepdim=True) + eps
    elif scale == "batch" and r.numel() > 1:
        divisor = (r - r[0, 0]).std() + eps
    return (centred / torch.where(divisor == 0, 1.0, divisor)).flatten().float()


def _output(
    spec: GRPOLoss, logp: torch.Tensor, entropy: torch.Tensor | None, tokens: Tokens, e: Evaluation
) -> GRPOLossOutput:
    flags = e.clip_low, e.clip_high
    return make_output(spec, e.loss.sum(), logp.detach(), entropy, e.kl.detach(), *flags, tokens.scored)


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
) -> GRPOLossOutput:
    optional = {"old_logp": old_logp, "ref_logp": ref_logp, "sampler_logp": sampler_logp}
    denominators = {"num_sequences": num_sequences, "num_tokens": num_tokens}
    check_loss_inputs(spec, logp, sequence_id, advantage, optional, denominators)
    scored = torch.ones_like(sequence_id, dtype=torch.bool)
    tokens = prepare_tokens(
        spec, sequence_id, advantage, scored, logp.dtype, old_logp, ref_logp, sampler_logp, num_sequences, num_tokens
    )
    return _output(spec, logp, None, tokens, evaluate(logp, tokens, spec))


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
) -> GRPOLossOutput:
    check_head(hidden, weight, "reference")
    check_target(target, hidden, weight.shape[0])
    check_share("sparse_tau", sparse_tau)
    optional = {"old_logp": old_logp, "ref_logp": ref_logp, "sampler_logp": sampler_logp, "near_logp": near_logp}
    denominators = {"num_sequences": num_sequences, "num_tokens": num_tokens}
    check_loss_inputs(spec, hidden, sequence_id, advantage, optional, denominators)
    logits = _logits(hidden, weight, spec.temperature)
    logp, entropy = _scores(logits, target)
    scored = target != IGNORE_INDEX
    tokens = prepare_tokens(
        spec, sequence_id, advantage, scored, logp.dtype, old_logp, ref_logp, sampler_logp, num_sequences, num_tokens
    )
    e = evaluate(logp, tokens, spec)
    out = _output(spec, logp, entropy.detach(), tokens, e)
    if not sparse_tau:
        return out
    how = SparseTokens.none(hidden)
    if logits.requires_grad:
        how = _leave_out(logits, target, e.gradient, sparse_tau)
    return out._replace(**how.summary(scored))


def _leave_out(logits: torch.Tensor, target: torch.Tensor, gradient: torch.Tensor, tau: float) -> SparseTokens:
    """Set the coming gradient of these logits [N, V] to 0 where sparse_gradient.py leaves it out of one chunk of N
    tokens. `gradient`: [N] d loss / d logp."""
    p = torch.softmax(logits.detach(), dim=-1)
    likely = (p >= THRESHOLD).scatter(1, target.clamp(min=0)[:, None], True)
    outside = p.masked_fill(likely, 0.0).sum(1)
    sparse = (gradient != 0) & (outside <= tau) & (likely.sum(1) <= MOST_COLUMNS)
    left_out = torch.zeros_like(likely)
    for block in torch.arange(len(p), device=p.device).split(BLOCK_ROWS):
        rows = block[sparse[block]]
        left_out[rows] = ~likely[rows].any(0)
    logits.register_hook(lambda grad: grad.masked_fill(left_out, 0.0))
    kept = torch.where(sparse, (~left_out).to(p.dtype).mean(1), 0.0)
    return SparseTokens(torch.where(sparse, outside, 0.0), (gradient != 0) & ~sparse, kept)


def linear_sample(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    temperature: float = 1.0,
    seed: int | torch.Tensor,
    row_key: torch.Tensor,
    position: torch.Tensor,
    greedy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_head(hidden, weight, "reference")
    check_rows(hidden, row_key, position)
    check_temperature(temperature)
    V = weight.shape[0]
    log_p = torch.log_softmax(_logits(hidden, weight, temperature), dim=-1)
    seed = seed_tensor(seed, hidden)
    score = log_p if greedy else log_p - exponential_noise(seed, row_key, position, 0, V).log()
    token = score.argmax(1)
    return token, log_p.gather(1, token[:, None])[:, 0].float()


def paged_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, pages: Pages, *, scale: float | None = None
) -> torch.Tensor:
    """Row by row, without regard to which pages are shared."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    rep = query.shape[1] // keys.shape[2]
    rows = []
    for q, row_pages, length in zip(query, pages.block_table.long(), pages.lengths.tolist(), strict=True):
        k, v = (x[row_pages].flatten(0, 1)[:length].repeat_interleave(rep, dim=1) for x in (keys, values))
        weight = torch.einsum("hd,thd->ht", q, k).mul(scale).softmax(-1)
        rows.append(torch.einsum("ht,thd->hd", weight, v))
    return torch.stack(rows) if rows else query.clone()


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, *, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    check_norm(x, delta, weight, eps, "reference")
    total = x if delta is None else x + delta
    wide = total if total.dtype == torch.float64 else total.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return total, weight * scaled.to(x.dtype)


def rope_append(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slot: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    check_rope(qkv, cos, sin, slot, keys, values, "reference")
    K, d = keys.shape[2:]
    H = qkv.shape[1] // d - 2 * K
    qk, v = qkv.unflatten(-1, (-1, d)).split([H + K, K], dim=1)
    first, second = qk.chunk(2, dim=-1)
    turned = qk * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
    query, key = turned.split([H, K], dim=1)
    keys.flatten(0, 1).index_copy_(0, slot, key)
    values.flatten(0, 1).index_copy_(0, slot, v)
    return query


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up
