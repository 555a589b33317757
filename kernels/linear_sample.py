"""lm_head matmul + exact sample + log-prob, for decode.

    E_rv = Exp(1) noise, a function of (seed, row_key_r, position_r, v) alone
    token_r = argmax over v of e^(z_rv) / E_rv  ~  softmax(z_r);  logp_r = z_r,token - logsumexp(z_r)

The exponential race is exact as long as E is accurate near 0, where unlikely tokens win: E = -log1p(-u) with
a 31-bit u keeps a token of probability 1e-6 at its probability, -log(u) in fp32 would not. The noise is a
splitmix64 hash of a 64-bit row key and the vocabulary id, two ids from one hash.

FLOPs 2RVD, bytes 2VD (bf16 weight, read once; at decode sizes this is the floor) + R/128 times nothing: the
logits never leave the chip on CUDA, nor more than `TILE_BYTES` of them exist on the CPU.
Tolerance: log-probs in fp32 within 1e-5 of float64; tokens equal across implementations on fp32 inputs.
Measured on a GPU: not yet.

Shapes: R rows, V vocabulary, D hidden.
"""

import torch

from .checks import check_head, check_temperature, check_tensor, choose_impl, require

TILE_BYTES = 1 << 24
GOLDEN = 0x9E3779B97F4A7C15
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
BELOW_ONE = 1.0 - 2.0**-24  # u = 1 would give infinite noise to a token that may hold all the mass


def _signed(x: int) -> int:
    """The int64 with the same 64 bits."""
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >> 63 else x


def _mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser on int64, in place; the masks make the shifts logical."""
    x.bitwise_xor_((x >> 30).bitwise_and_((1 << 34) - 1)).mul_(_signed(MIX_1))
    x.bitwise_xor_((x >> 27).bitwise_and_((1 << 37) - 1)).mul_(_signed(MIX_2))
    return x.bitwise_xor_((x >> 31).bitwise_and_((1 << 33) - 1))


def row_state(seed: int, row_key: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """[R] int64: where in the 2^64 cycle the noise of this row at this position starts."""
    start = _mix(row_key * _signed(GOLDEN) + _signed((seed + 1) * MIX_2))
    return _mix(start.add_(position * _signed(GOLDEN)))


def negative_noise(state: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """-E [R, stop - start] fp32 for the vocabulary ids start .. stop; start is even."""
    pair = torch.arange(start // 2 + 1, (stop + 1) // 2 + 1, device=state.device)
    bits = _mix(state[:, None] + pair.mul_(_signed(GOLDEN)))
    u = bits.view(torch.int32)[:, : stop - start].bitwise_and_(0x7FFFFFFF).float()
    return u.mul_(-(2.0**-31)).sub_(2.0**-32).clamp_(min=-BELOW_ONE).log1p_()


def exponential_noise(
    seed: int, row_key: torch.Tensor, position: torch.Tensor, start: int, stop: int
) -> torch.Tensor:
    return negative_noise(row_state(seed, row_key, position), start, stop).neg_()


def check_rows(hidden: torch.Tensor, row_key: torch.Tensor, position: torch.Tensor) -> None:
    check_tensor("row_key", row_key, (hidden.shape[0],), (torch.int64,), hidden)
    check_tensor("position", position, (hidden.shape[0],), (torch.int64,), hidden)


def _sample_torch(
    hidden: torch.Tensor, weight: torch.Tensor, inv_temperature: float, state: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Vocabulary tiles with a running winner and log-sum-exp; `state` None = greedy."""
    (R, _), V = hidden.shape, weight.shape[0]
    hidden = hidden.float() * inv_temperature
    tile = max(1024, TILE_BYTES // (4 * max(R, 1))) & ~1
    best = None
    for start in range(0, V, tile):
        stop = min(start + tile, V)
        logits = hidden @ weight[start:stop].float().t()
        top = logits.amax(1, keepdim=True)
        weights = (logits - top).exp_()
        total = weights.sum(1)
        if state is None:
            token = logits.argmax(1, keepdim=True)
            score = top
        else:
            race = weights.div_(negative_noise(state, start, stop))  # negative: smallest wins
            score, token = race.min(1, keepdim=True)
            score = score.neg_().log_().add_(top)
        logit = logits.gather(1, token)
        new = (score[:, 0], token[:, 0] + start, logit[:, 0], top[:, 0] + total.log_())
        best = new if best is None else _merge(best, new)
    _, token, logit, lse = best
    return token, logit - lse


def _merge(a: tuple, b: tuple) -> tuple:
    wins = b[0] > a[0]  # ties go to the lower id, as argmax does
    winner = (torch.where(wins, y, x) for x, y in zip(a[:3], b[:3], strict=True))
    return *winner, torch.logaddexp(a[3], b[3])


@torch.no_grad()
def linear_sample(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    temperature: float = 1.0,
    seed: int,
    row_key: torch.Tensor,
    position: torch.Tensor,
    greedy: bool = False,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample from softmax(hidden @ weight.T / temperature) without logits in memory.

    Args:
        hidden: [R, D].
        weight: [V, D], the lm_head.
        temperature: divides the logits.
        seed, row_key, position: the randomness is a function of these alone; row_key, position [R] int64.
        greedy: take the most likely token instead.
        impl: auto | triton | torch | reference.

    Returns:
        token [R] int64 and its log-prob [R] fp32 at this temperature.
    """
    impl = choose_impl(impl, hidden)
    check_head(hidden, weight, impl)
    check_rows(hidden, row_key, position)
    check_temperature(temperature)
    require(isinstance(seed, int), "seed", f"an int, got {type(seed).__name__}")
    if impl == "reference":
        from . import reference

        return reference.linear_sample(
            hidden, weight, temperature=temperature, seed=seed, row_key=row_key,
            position=position, greedy=greedy,
        )  # fmt: skip
    state = None if greedy else row_state(seed, row_key, position)
    return _sample_torch(hidden, weight, 1.0 / temperature, state)
