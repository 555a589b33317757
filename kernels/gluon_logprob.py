"""`linear_logprob`'s forward for sm_90 in Gluon (gluon_ring.py). The splits, the statistics of each and the sum over
them are those of `logprob_kernel`.

An estimate of what it brings: from 60-72% of the tensor cores' rate to 75-85%. Not measured.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .chunks import work_item
from .gluon_ring import (
    ACCUMULATOR,
    Settings,
    cluster_barrier,
    invalidate_ring,
    launch,
    multiply_tile,
    new_ring,
    producer,
)
from .online_softmax import LOG2_E, LOWEST, as_in_memory, online

STAGES = 4


@gluon.jit
def consumer(
    CONSUMER: gl.constexpr, ring, plan, target_ptr, out, inv_temperature, S: gl.constexpr, ENTROPY: gl.constexpr
):
    """Keep the statistics of its rows."""
    BY_ROW: gl.constexpr = gl.SliceLayout(1, ACCUMULATOR)
    BY_COLUMN: gl.constexpr = gl.SliceLayout(0, ACCUMULATOR)
    scale = inv_temperature * LOG2_E
    N, V, num_splits = plan
    row_blocks = gl.cdiv(N, 2 * S.rows)
    step = 0
    cluster_barrier()
    for item in range(gl.program_id(0), row_blocks * num_splits, gl.num_programs(0)):
        row_block, split = work_item(item, row_blocks, num_splits, S.group)
        offs_n = (2 * row_block + CONSUMER) * S.rows + gl.arange(0, S.rows, BY_ROW)
        in_n = offs_n < N
        target = gl.load(target_ptr + offs_n, mask=in_n, other=-1).to(gl.int32)
        top = gl.full([S.rows], LOWEST, gl.float32, BY_ROW)
        total = gl.full([S.rows], 0.0, gl.float32, BY_ROW)
        mean = gl.full([S.rows], 0.0, gl.float32, BY_ROW)
        target_logit = gl.full([S.rows], 0.0, gl.float32, BY_ROW)
        for column in range(split * S.split, min(split * S.split + S.split, V), S.columns):
            z, step = multiply_tile(CONSUMER, ring, step, S)
            offs_v = column + gl.arange(0, S.columns, BY_COLUMN)
            z = gl.where((offs_v < V)[None, :], as_in_memory(z, ring[0].dtype, True), LOWEST)
            top, total, mean = online(top, total, mean, z, scale, ENTROPY)
            target_logit += gl.sum(gl.where(offs_v[None, :] == target[:, None], z, 0.0), 1)
        at = split * N + offs_n
        gl.store(out[0] + at, top, mask=in_n)
        gl.store(out[1] + at, total, mask=in_n)
        if ENTROPY:
            gl.store(out[2] + at, mean, mask=in_n)
        gl.store(out[3] + at, target_logit, mask=in_n)
    cluster_barrier()


@gluon.jit(do_not_specialize=["N", "empty_offset"], do_not_specialize_on_alignment=["target_ptr"])
def gluon_logprob_kernel(
    hidden,
    weight,
    target_ptr,
    max_ptr,
    sum_ptr,
    mean_ptr,
    target_logit_ptr,  # [splits, N]
    N,
    V,
    num_splits,
    inv_temperature,
    empty_offset,
    S: gl.constexpr,
    ENTROPY: gl.constexpr,
):
    """`hidden` and `weight` are tensor descriptors. Every warp belongs to one of the three parts, because all have to
    take part in `cluster_barrier`."""
    a, b, ready, empty = new_ring(hidden, weight, S)
    plan = (N, V, num_splits)
    out = (max_ptr, sum_ptr, mean_ptr, target_logit_ptr)
    ring = (a, b, ready, empty_offset)
    gl.warp_specialize(
        [
            (consumer, (0, ring, plan, target_ptr, out, inv_temperature, S, ENTROPY)),
            (consumer, (1, ring, plan, target_ptr, out, inv_temperature, S, ENTROPY)),
            (producer, (hidden, weight, a, b, ready, empty, plan, S)),
        ],
        [4, 4],
        [232, 40],
    )
    invalidate_ring(ready, empty, S)


def gluon_statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    inv_temperature: float,
    entropy: bool,
    split: int,
    out: tuple[torch.Tensor, ...],
) -> None:
    """Fill `out`: top, total, mean and target logit [splits, N] fp32 (online_softmax.py) of each split of `split`
    columns of hidden [N, D] @ weight [V, D]^T."""
    numbers = {"inv_temperature": inv_temperature, "ENTROPY": entropy}
    settings = Settings(hidden.shape[1], split, STAGES)
    launch(gluon_logprob_kernel, hidden, weight, settings, target, *out, **numbers)
