"""The first matmul of `linear_grpo_loss` and its one pass over the logits in one kernel, in Gluon for sm_90
(gluon_ring.py): for tokens whose log-sum-exp is known, e = 2^(z - offset) leaves the tensor cores' registers, and no
logit is ever in memory (loss_chunks.py).

Why: the pass reads and writes 2 N V bytes each; here the writes alone remain, under the next tile's matmul. An estimate
of what that brings at N = 5,600: 0.8 ms of 13. Worth it only if the matmul is not slower than cuBLAS's. Not measured.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

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
    tiles_of,
)
from .linear_logprob import SPLIT
from .online_softmax import LOG2_E, as_in_memory

STAGES = 3  # beside 64 KB of results


@gluon.jit
def consumer(CONSUMER: gl.constexpr, ring, plan, result, buffer, known, out, inv_temperature, S: gl.constexpr):
    """Write the exponentials of its rows, and their sums over each split."""
    BY_ROW: gl.constexpr = gl.SliceLayout(1, ACCUMULATOR)
    BY_COLUMN: gl.constexpr = gl.SliceLayout(0, ACCUMULATOR)
    scale = inv_temperature * LOG2_E
    N, V, num_splits = plan
    target_ptr, offset_ptr = known
    total_ptr, mean_ptr, target_y_ptr = out
    row_blocks = gl.cdiv(N, 2 * S.rows)
    step = 0
    cluster_barrier()
    for item in range(gl.program_id(0), row_blocks * num_splits, gl.num_programs(0)):
        row_block, split = work_item(item, row_blocks, num_splits, S.group)
        row = (2 * row_block + CONSUMER) * S.rows
        offs_n = row + gl.arange(0, S.rows, BY_ROW)
        in_n = offs_n < N
        target = gl.load(target_ptr + offs_n, mask=in_n, other=-1).to(gl.int32)
        offset = gl.load(offset_ptr + offs_n, mask=in_n, other=1e30)
        total = gl.full([S.rows], 0.0, gl.float32, BY_ROW)
        mean = gl.full([S.rows], 0.0, gl.float32, BY_ROW)
        for column in range(split * S.split, min(split * S.split + S.split, V), S.columns):
            z, step = multiply_tile(CONSUMER, ring, step, S)
            offs_v = column + gl.arange(0, S.columns, BY_COLUMN)
            z = as_in_memory(z, ring[0].dtype, True)
            y = gl.where((offs_v < V)[None, :], z * scale - offset[:, None], -1e30)
            at_target = gl.expand_dims(target_y_ptr + offs_n, 1) + gl.expand_dims(0 * offs_v, 0)
            gl.store(at_target, y, mask=offs_v[None, :] == target[:, None])
            e = gl.exp2(y)
            mean += gl.sum(e * y, 1)
            total += gl.sum(e, 1)
            e = e.to(ring[0].dtype)
            tma.store_wait(0)  # the buffer's last tile is on its way
            buffer.store(e)
            fence_async_shared()
            tma.async_copy_shared_to_global(result, [row, column], buffer)
        at = split * N + offs_n
        gl.store(total_ptr + at, total, mask=in_n)
        gl.store(mean_ptr + at, mean, mask=in_n)
    tma.store_wait(0)
    cluster_barrier()


@gluon.jit(do_not_specialize=["N", "empty_offset"], do_not_specialize_on_alignment=["target_ptr", "offset_ptr"])
def gluon_exponentials_kernel(
    hidden,
    weight,
    result,
    target_ptr,
    offset_ptr,  # [N]
    total_ptr,
    mean_ptr,  # [splits, N]
    target_y_ptr,  # [N]
    N,
    V,
    num_splits,
    inv_temperature,
    empty_offset,
    S: gl.constexpr,
):
    """`hidden`, `weight` and `result` [N, V] are tensor descriptors. Every warp belongs to one of the three parts,
    because all have to take part in `cluster_barrier`."""
    a, b, ready, empty = new_ring(hidden, weight, S)
    buffers = gl.allocate_shared_memory(result.dtype, [2, S.rows, S.columns], result.layout)
    plan = (N, V, num_splits)
    out = (total_ptr, mean_ptr, target_y_ptr)
    ring = (a, b, ready, empty_offset)
    known = (target_ptr, offset_ptr)
    first, second = buffers.index(0), buffers.index(1)
    gl.warp_specialize(
        [
            (consumer, (0, ring, plan, result, first, known, out, inv_temperature, S)),
            (consumer, (1, ring, plan, result, second, known, out, inv_temperature, S)),
            (producer, (hidden, weight, a, b, ready, empty, plan, S)),
        ],
        [4, 4],
        [240, 24],
    )
    invalidate_ring(ready, empty, S)


def fill_exponentials(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    offset: torch.Tensor,
    inv_temperature: float,
    result: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fill `result` [n, V] with e = 2^y for y = hidden [n, D] @ weight [V, D]^T / temperature in bits - offset [n].
    Return, all [n] fp32, the sum of each row's e, that of e y, and the target's y, which is undefined of an ignored
    token."""
    splits = triton.cdiv(len(weight), SPLIT)
    total, mean = (offset.new_empty(splits, len(hidden)) for _ in range(2))
    target_y = torch.empty_like(offset)
    settings = Settings(hidden.shape[1], SPLIT, STAGES)
    tiles = tiles_of(result, settings.rows, settings.columns, divided=True)
    arguments = (tiles, target, offset, total, mean, target_y)
    launch(gluon_exponentials_kernel, hidden, weight, settings, *arguments, inv_temperature=inv_temperature)
    return total.sum(0), mean.sum(0), target_y
