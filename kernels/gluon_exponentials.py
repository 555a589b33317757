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
    COLUMNS,
    ROWS,
    cluster_barrier,
    invalidate_ring,
    launch,
    multiply_tile,
    new_ring,
    producer,
    tiles_of,
)
from .online_softmax import LOG2_E, as_in_memory

STAGES = 3  # of 48 KB, beside 64 KB of results
SPLIT = 4096  # vocabulary columns of a work item


@gluon.jit
def consumer(
    CONSUMER: gl.constexpr,
    ring,
    plan,
    result,
    buffer,
    known,
    out,
    inv_temperature,
    D: gl.constexpr,
    SPLIT: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Write the exponentials of ROWS rows, and their sums over each split."""
    ROWS: gl.constexpr = ring[0].type.shape[1]
    COLUMNS: gl.constexpr = ring[1].type.shape[1]
    BY_ROW: gl.constexpr = gl.SliceLayout(1, ACCUMULATOR)
    BY_COLUMN: gl.constexpr = gl.SliceLayout(0, ACCUMULATOR)
    scale = inv_temperature * LOG2_E
    N, V, num_splits = plan
    target_ptr, offset_ptr = known
    total_ptr, mean_ptr, target_y_ptr = out
    row_blocks = gl.cdiv(N, 2 * ROWS)
    step = 0
    cluster_barrier()
    for item in range(gl.program_id(0), row_blocks * num_splits, gl.num_programs(0)):
        row_block, split = work_item(item, row_blocks, num_splits, GROUP)
        row = (2 * row_block + CONSUMER) * ROWS
        offs_n = row + gl.arange(0, ROWS, BY_ROW)
        in_n = offs_n < N
        target = gl.load(target_ptr + offs_n, mask=in_n, other=-1).to(gl.int32)
        offset = gl.load(offset_ptr + offs_n, mask=in_n, other=1e30)
        total = gl.full([ROWS], 0.0, gl.float32, BY_ROW)
        mean = gl.full([ROWS], 0.0, gl.float32, BY_ROW)
        for column in range(split * SPLIT, min(split * SPLIT + SPLIT, V), COLUMNS):
            z, step = multiply_tile(CONSUMER, ring, step, D, STAGES)
            offs_v = column + gl.arange(0, COLUMNS, BY_COLUMN)
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
    D: gl.constexpr,
    SPLIT: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    ARRIVALS: gl.constexpr,
):
    """`hidden`, `weight` and `result` [N, V] are tensor descriptors. Every warp belongs to one of the three parts,
    because all have to take part in `cluster_barrier`."""
    a, b, ready, empty = new_ring(hidden, weight, STAGES, ARRIVALS)
    buffers = gl.allocate_shared_memory(
        result.dtype, [2, result.block_type.shape[0], result.block_type.shape[1]], result.layout
    )
    plan = (N, V, num_splits)
    out = (total_ptr, mean_ptr, target_y_ptr)
    ring = (a, b, ready, empty_offset)
    known = (target_ptr, offset_ptr)
    first, second = buffers.index(0), buffers.index(1)
    gl.warp_specialize(
        [
            (consumer, (0, ring, plan, result, first, known, out, inv_temperature, D, SPLIT, GROUP, STAGES)),
            (consumer, (1, ring, plan, result, second, known, out, inv_temperature, D, SPLIT, GROUP, STAGES)),
            (producer, (hidden, weight, a, b, ready, empty, plan, D, SPLIT, GROUP, STAGES)),
        ],
        [4, 4],
        [240, 24],
    )
    invalidate_ring(ready, empty, STAGES)


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
    tiles = tiles_of(result, ROWS, COLUMNS, divided=True)
    arguments = (tiles, target, offset, total, mean, target_y)
    launch(gluon_exponentials_kernel, hidden, weight, SPLIT, STAGES, *arguments, inv_temperature=inv_temperature)
    return total.sum(0), mean.sum(0), target_y
