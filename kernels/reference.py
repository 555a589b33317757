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
    check_target,
    check_temperature,
)
from .loss_settings import GRPOLoss
from .objective import GRPOLossOutput, Tokens, check_loss_inputs, evaluate, make_output, prepare_tokens
from .page_table import Pages
from .sampling_noise import exponential_noise, seed_tensor


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
    scored = target != IGNORE_INDEX
    log_p = torch.log_softmax(_logits(hidden, weight, temperature), dim=-1)
    logp = log_p.gather(1, target.clamp(min=0)[:, None])[:, 0]
    logp = torch.where(scored, logp, 0.0)
    if not entropy:
        return logp
    return logp, torch.where(scored, -(log_p.exp() * log_p).sum(1), 0.0)


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


def _loss(spec: GRPOLoss, logp: torch.Tensor, entropy: torch.Tensor | None, tokens: Tokens) -> GRPOLossOutput:
    e = evaluate(logp, tokens, spec)
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
    return _loss(spec, logp, None, tokens)


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
) -> GRPOLossOutput:
    optional = {"old_logp": old_logp, "ref_logp": ref_logp, "sampler_logp": sampler_logp, "near_logp": near_logp}
    denominators = {"num_sequences": num_sequences, "num_tokens": num_tokens}
    check_loss_inputs(spec, hidden, sequence_id, advantage, optional, denominators)
    logp, entropy = linear_logprob(hidden, weight, target, temperature=spec.temperature, entropy=True)
    scored = target != IGNORE_INDEX
    tokens = prepare_tokens(
        spec, sequence_id, advantage, scored, logp.dtype, old_logp, ref_logp, sampler_logp, num_sequences, num_tokens
    )
    return _loss(spec, logp, entropy.detach(), tokens)


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
