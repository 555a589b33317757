"""lm_head matmul + exact sample + log-prob, for decode.

    E_rv = Exp(1) noise, a function of (seed, row_key_r, position_r, v) alone
    token_r = argmax over v of e^(z_rv) / E_rv  ~  softmax(z_r);  logp_r = z_r,token - logsumexp(z_r)

The exponential race is exact as long as E is accurate near 0, where unlikely tokens win: E = -log1p(-u) with
a 31-bit u keeps a token of probability 1e-6 at its probability, -log(u) in fp32 would not. The noise is a
splitmix64 hash of a 64-bit row key and half the vocabulary id, whose two halves serve the ids 2i and 2i + 1.
Logits are rounded to the inputs' dtype, as `linear_logprob`'s: the trainer's log-probs are then equal to the sampler's.

FLOPs 2RVD. Bytes: 2VD for a bf16 weight read once from memory (the floor at decode sizes; every 64 rows read it
again, from L2) and 40 RV/128 for the tiles' winners, written and read. The logits stay on chip on CUDA below
`ROWS_IN_MEMORY` rows; from there on, where the matmul takes longer than the weight's way from memory, it is cuBLAS's
and a second kernel reads the 2RV bytes of logits, 78 MB at 256 rows of 152k. On the CPU at most `CPU_TILE_BYTES` of
them exist.
Tolerance: log-probs in fp32 within 1e-5 of float64; tokens equal across implementations on fp32 inputs.
Measured on a GPU: not yet.

Shapes: R rows, V vocabulary, D hidden.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import checks
from .checks import check_head, check_rows, check_temperature, choose_impl, full_fp32, interpreted, op_scope
from .online_softmax import BITS_TO_NATS, LN_2, LOG2_E, LOGITS, LOWEST, as_in_memory
from .sampling_noise import GOLDEN, MIX_2, exponential, mix, negative_noise, row_state, seed_tensor

CPU_TILE_BYTES = 1 << 24  # of fp32 logits at a time

# BLOCK_V, BLOCK_D, stages; the vocabulary is the matmul's M, so that few rows fill a wgmma
WGMMA_TILE = (128, 64, 4)  # two programs a multiprocessor at 64 rows; a fifth stage leaves room for one
FP32_TILE = (64, 16, 2)
ROWS_IN_MEMORY = 128  # from here on cuBLAS and a second kernel: an estimate, no GPU has measured it
ROW_TILE = 4096  # logits of a row in one program of the second kernel


@triton.jit
def write_winners(z, offs_v, offs_r, tile, places, out, R, V, inv_temperature, GREEDY: tl.constexpr):
    """Write each row's winner in a vocabulary tile, and the tile's share of the row's log-sum-exp. z: logits of the ids
    `offs_v` and the rows `offs_r`."""
    row_key_ptr, position_ptr, seed_ptr = places
    score_ptr, token_ptr, logit_ptr, top_ptr, total_ptr = out
    in_r = offs_r < R
    z = tl.where((offs_v < V)[:, None], z * (inv_temperature * LOG2_E), LOWEST)
    top = tl.max(z, 0)
    race = top[None, :] - z  # the lowest wins
    if not GREEDY:
        key = tl.load(row_key_ptr + offs_r, mask=in_r, other=0).to(tl.uint64, bitcast=True)
        place = tl.load(position_ptr + offs_r, mask=in_r, other=0).to(tl.uint64, bitcast=True)
        start = (tl.load(seed_ptr) + 1).to(tl.uint64, bitcast=True) * MIX_2
        state = mix(mix(key * GOLDEN + start) + place * GOLDEN)
        race = tl.exp2(race) * exponential(state[None, :], offs_v[:, None])
    best = tl.min(race, 0)
    token = tl.min(tl.where(race == best[None, :], offs_v[:, None], V), 0)
    logit = tl.sum(tl.where(offs_v[:, None] == token[None, :], z, 0.0), 0)
    total = tl.sum(tl.exp2(z - top[None, :]), 0)
    score = top
    if not GREEDY:
        score = top - tl.log2(best)
    at = tile * R + offs_r
    tl.store(score_ptr + at, score, mask=in_r)
    tl.store(token_ptr + at, token, mask=in_r)
    tl.store(logit_ptr + at, logit, mask=in_r)
    tl.store(top_ptr + at, top, mask=in_r)
    tl.store(total_ptr + at, total, mask=in_r)


@triton.jit(do_not_specialize=["R"])
def linear_sample_kernel(
    hidden,
    weight,
    row_key_ptr,
    position_ptr,
    seed_ptr,
    score_ptr,
    token_ptr,
    logit_ptr,
    top_ptr,
    total_ptr,  # [tiles, R]
    R,
    V,
    D: tl.constexpr,
    inv_temperature,
    stride_hidden,
    stride_weight,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GREEDY: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUND: tl.constexpr,
    PAIRS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One program per vocabulary tile and row block: the tile's winner and its share of the log-sum-exp.
    `hidden` and `weight` are tensor descriptors if TMA, else pointers."""
    tile = tl.program_id(1)  # row blocks run fastest, so that they share the tile's weights in L2
    lane_v = tl.arange(0, BLOCK_V)
    offs_v = tile * BLOCK_V + lane_v
    row = tl.program_id(0) * BLOCK_R
    offs_r = row + tl.arange(0, BLOCK_R)
    in_r = offs_r < R
    acc = tl.zeros([BLOCK_V, BLOCK_R], tl.float32)
    if not TMA:  # 64 bits for the tile's corner, 32 inside it
        w_ptr = weight + tile * BLOCK_V * tl.cast(stride_weight, tl.int64)
    for k in range(0, D, BLOCK_D):
        if TMA:
            w = weight.load([tile * BLOCK_V, k])
            x = hidden.load([row, k])
        else:
            offs_d = k + tl.arange(0, BLOCK_D)
            in_d = offs_d < D
            w = tl.load(
                w_ptr + lane_v[:, None] * stride_weight + offs_d[None, :],
                mask=(offs_v < V)[:, None] & in_d[None, :],
                other=0.0,
            )
            x = tl.load(
                hidden + offs_r[:, None] * stride_hidden + offs_d[None, :],
                mask=in_r[:, None] & in_d[None, :],
                other=0.0,
            )
        if UPCAST:
            w = w.to(tl.float32)
            x = x.to(tl.float32)
        acc = tl.dot(w, x.T, acc, input_precision=PRECISION)
    z = as_in_memory(acc, ROUND, PAIRS)
    places = (row_key_ptr, position_ptr, seed_ptr)
    out = (score_ptr, token_ptr, logit_ptr, top_ptr, total_ptr)
    write_winners(z, offs_v, offs_r, tile, places, out, R, V, inv_temperature, GREEDY)


@triton.jit(do_not_specialize=["R"])
def sample_rows_kernel(
    logits_ptr,  # [R, V]
    row_key_ptr,
    position_ptr,
    seed_ptr,
    score_ptr,
    token_ptr,
    logit_ptr,
    top_ptr,
    total_ptr,  # [tiles, R]
    R,
    V,
    inv_temperature,
    BLOCK_V: tl.constexpr,
    GREEDY: tl.constexpr,
):
    """One program per row and vocabulary tile: what `linear_sample_kernel` does with its logits, with those in
    memory."""
    row = tl.program_id(0)
    tile = tl.program_id(1)
    offs_v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    z = tl.load(logits_ptr + row.to(tl.int64) * V + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)
    places = (row_key_ptr, position_ptr, seed_ptr)
    out = (score_ptr, token_ptr, logit_ptr, top_ptr, total_ptr)
    write_winners(z[:, None], offs_v, row + tl.arange(0, 1), tile, places, out, R, V, inv_temperature, GREEDY)


@triton.jit(do_not_specialize=["R"])
def combine_tiles_kernel(
    score_ptr, token_ptr, logit_ptr, top_ptr, total_ptr, sample_ptr, logp_ptr, R, tiles, V, BLOCK: tl.constexpr
):
    """One program per row: the best of the tiles' winners, and its log-prob."""
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    in_tiles = lane < tiles
    offset = lane * R + row
    score = tl.load(score_ptr + offset, mask=in_tiles, other=-float("inf"))
    token = tl.load(token_ptr + offset, mask=in_tiles, other=V)
    best = tl.min(tl.where(score == tl.max(score, 0), token, V), 0)
    logit = tl.load(logit_ptr + offset, mask=in_tiles, other=0.0)
    logit = tl.sum(tl.where(token == best, logit, 0.0), 0)
    top = tl.load(top_ptr + offset, mask=in_tiles, other=LOWEST)
    total = tl.load(total_ptr + offset, mask=in_tiles, other=0.0)
    highest = tl.max(top, 0)
    total = tl.sum(total * tl.exp2(top - highest), 0)
    tl.store(sample_ptr + row, tl.minimum(best, V - 1).to(tl.int64))  # V: a row of NaN
    tl.store(logp_ptr + row, ((logit - highest) - tl.log2(total)) * BITS_TO_NATS)


def sample_launch(hidden: torch.Tensor, weight: torch.Tensor) -> tuple:
    """Return the matrices and constants of `linear_sample_kernel` that depend on dtype, rows and architecture."""
    hidden, weight = checks.align_rows(hidden, weight)
    is_fp32, tma = hidden.dtype == torch.float32, checks.tma_ready(hidden, weight)
    block_v, block_d, stages = FP32_TILE if is_fp32 else WGMMA_TILE
    block_r = min(64, max(16, triton.next_power_of_2(len(hidden))))
    warps = 8 if block_r == 64 else 4
    matrices = (hidden, weight)
    if tma:
        shapes = ([block_r, block_d], [block_v, block_d])
        matrices = tuple(map(TensorDescriptor.from_tensor, matrices, shapes))
    constants = {
        "D": hidden.shape[1],
        "stride_hidden": hidden.stride(0),
        "stride_weight": weight.stride(0),
        "BLOCK_R": block_r,
        "BLOCK_V": block_v,
        "BLOCK_D": block_d,
        "TMA": tma,
        "PRECISION": "ieee" if is_fp32 else "tf32",
        "num_warps": warps,
        "num_stages": stages,
        "ROUND": LOGITS[hidden.dtype],
        "PAIRS": not interpreted(),
        "UPCAST": interpreted() and hidden.dtype == torch.bfloat16,
    }
    return matrices, constants


def _sample_triton(hidden, weight, inv_temperature, seed, row_key, position, greedy):
    R, V = len(hidden), len(weight)
    token, logp = torch.empty_like(row_key), hidden.new_empty(R, dtype=torch.float32)
    if R == 0:
        return token, logp
    if R >= ROWS_IN_MEMORY:
        kernel, matrices = sample_rows_kernel, (hidden @ weight.t(),)
        rows, constants = 1, {"BLOCK_V": ROW_TILE, "num_warps": 8}
    else:
        kernel = linear_sample_kernel
        matrices, constants = sample_launch(hidden, weight)
        rows = constants["BLOCK_R"]
    tiles = triton.cdiv(V, constants["BLOCK_V"])
    score, logit, top, total = (logp.new_empty(tiles, R) for _ in range(4))
    winner = torch.empty_like(score, dtype=torch.int32)
    kernel[(triton.cdiv(R, rows), tiles)](
        *matrices,
        row_key,
        position,
        seed,
        score,
        winner,
        logit,
        top,
        total,
        R=R,
        V=V,
        inv_temperature=inv_temperature,
        GREEDY=greedy,
        **constants,
    )
    combine_tiles_kernel[(R,)](
        score, winner, logit, top, total, token, logp, R, tiles, V, BLOCK=triton.next_power_of_2(tiles)
    )
    return token, logp


def _sample_torch(
    hidden: torch.Tensor, weight: torch.Tensor, inv_temperature: float, state: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Vocabulary tiles with a running winner and log-sum-exp; `state` None = greedy. Logits in bits and no
    torch.log on a single tile, for the reasons given at `chunked_logits.Chunk`."""
    (R, _), V = hidden.shape, weight.shape[0]
    hidden = hidden.float() * (inv_temperature / LN_2)
    tile = max(1024, CPU_TILE_BYTES // (4 * max(R, 1))) & ~1
    best: tuple[torch.Tensor, ...] | None = None
    for start in range(0, V, tile):
        stop = min(start + tile, V)
        logits = hidden @ weight[start:stop].float().t()
        top = logits.amax(1, keepdim=True)
        weights = (logits - top).exp2_()
        total = weights.sum(1)
        if state is None:
            score, token = top, logits.argmax(1, keepdim=True)
        else:
            race = weights.div_(negative_noise(state, start, stop))  # negative: smallest wins
            score, token = race.min(1, keepdim=True)
            if tile < V:  # comparable across tiles
                score = score.neg_().log2_().add_(top)
        logit, top = logits.gather(1, token)[:, 0] * LN_2, top[:, 0] * LN_2
        new = (score[:, 0], token[:, 0] + start, logit, top, (total - 1.0).log1p_())
        best = new if best is None else _merge(best, new)
    assert best is not None, "a vocabulary has at least one tile"
    _, token, logit, top, log_total = best
    return token, (logit - top) - log_total


def _merge(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    wins = b[0] > a[0]  # ties go to the lower id, as argmax does
    winner = (torch.where(wins, y, x) for x, y in zip(a[:3], b[:3], strict=True))
    top = torch.maximum(a[3], b[3])
    return *winner, top, torch.logaddexp(a[4] + (a[3] - top), b[4] + (b[3] - top))


@op_scope
@full_fp32()
@torch.no_grad()
def linear_sample(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    temperature: float = 1.0,
    seed: int | torch.Tensor,
    row_key: torch.Tensor,
    position: torch.Tensor,
    greedy: bool = False,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample from softmax(hidden @ weight.T / temperature) without logits in memory. No gradient.

    Args:
        hidden: [R, D].
        weight: [V, D], the lm_head.
        temperature: divides the logits.
        seed: an int, or a 0-d int64 tensor on the device. The randomness depends on seed, row_key and position only.
        row_key: [R] int64.
        position: [R] int64.
        greedy: take the most probable token instead.
        impl: auto | triton | torch | reference.

    Returns:
        token [R] int64 and its log-prob [R] fp32 at this temperature.
    """
    impl = choose_impl(impl, hidden)
    if not checks.checks_skipped():
        check_head(hidden, weight, impl)
        check_rows(hidden, row_key, position)
        check_temperature(temperature)
    seed = seed_tensor(seed, hidden)
    if impl == "reference":
        from . import reference

        return reference.linear_sample(
            hidden, weight, temperature=temperature, seed=seed, row_key=row_key, position=position, greedy=greedy
        )
    if impl == "triton":
        hidden, weight = hidden.contiguous(), weight.contiguous()
        row_key, position = row_key.contiguous(), position.contiguous()
        return _sample_triton(hidden, weight, 1.0 / temperature, seed, row_key, position, greedy)
    state = None if greedy else row_state(seed, row_key, position)
    return _sample_torch(hidden, weight, 1.0 / temperature, state)
