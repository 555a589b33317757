"""What the Gluon kernels for sm_90 share: hidden [N, D] times weight [V, D]^T, tile by tile, by warps that copy and
warps that multiply.

A cluster of two CTAs takes 256 tokens through a vocabulary split in tiles of 256 columns. In each CTA 4 producer warps
copy tiles of `hidden` (128 rows of its own) and of `weight` (256 columns, one copy for both) by TMA into a ring of
slots. Two groups of 4 consumer warps, of 64 rows each, multiply them by m64n256k16 and then work on the product.

Why: 128 x 128 tiles ask the L2 for a byte per 64 FLOPs, which is 11 TB/s at 700 TF/s and more than it gives; this
asks for a byte per 128. The ring goes on through the ends of tiles, so that copies never pause, and a consumer may be
two steps ahead of the other: part of the exponentials of one run under the matmul of the other. Never run on a GPU;
`impl="gluon"` alone chooses it.

A slot is free when both CTAs have read it, because the copy writes into both. Triton 3.7 has no arrival at another
CTA's barrier, so RELEASE is PTX: one lane of each of the 2 x 2 x 4 consumer warps arrives at both CTAs' barriers. It
needs the barriers' address, which is read from the compiled kernel (`empty_offset`).
"""

import functools
import re
from typing import Any, NamedTuple

import torch
import triton
from triton.compiler import CompiledKernel
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language.nvidia.hopper import cluster, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .chunks import multiprocessors, work_item
from .online_softmax import LOGITS

ARRIVALS = 16  # at a slot's barrier: consumer warps of both CTAs


class Settings(NamedTuple):
    """What a kernel is compiled for."""

    D: int
    """Hidden size."""
    split: int
    """Vocabulary columns of a work item."""
    stages: int
    """Slots of the ring, of 48 KB each."""
    group: int = 24
    """Blocks of 256 rows that go through all splits together."""
    rows: int = 128
    """Of a consumer's tile, in both CTAs."""
    columns: int = 256
    """Of a tile."""
    depth: int = 64
    """Of the hidden size, in a step."""
    arrivals: int = ARRIVALS


ACCUMULATOR: gl.constexpr = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16], [[1, 0]]))
RELEASE: gl.constexpr = gl.constexpr("""{
    .reg .pred first;
    .reg .b32 lane, own, other;
    mov.u32 lane, %laneid;
    setp.eq.u32 first, lane, 0;
    mov.u32 own, global_smem;
    add.u32 own, own, $1;
    mapa.shared::cluster.u32 other, own, 0;
    @first mbarrier.arrive.shared::cluster.b64 _, [other];
    mapa.shared::cluster.u32 other, own, 1;
    @first mbarrier.arrive.shared::cluster.b64 _, [other];
    mov.u32 $0, 0;
}""")


@gluon.jit
def release(address):
    """Say that this warp has read the slot whose barrier lies at `address`, in bytes from the shared memory's start."""
    gl.inline_asm_elementwise(RELEASE, "=r,r", [address], gl.int32, is_pure=False, pack=1)


@gluon.jit
def cluster_barrier():
    """Wait for every warp of both CTAs: before the first copy into the other one, and before one of them ends."""
    cluster.arrive()
    cluster.wait()


@gluon.jit
def producer(hidden, weight, a, b, ready, empty, plan, S: gl.constexpr):
    """Fill the ring's slots in the order in which the consumers use them."""
    N, V, num_splits = plan
    row_blocks = gl.cdiv(N, 2 * S.rows)
    step = 0
    cluster_barrier()
    for item in range(gl.program_id(0), row_blocks * num_splits, gl.num_programs(0)):
        row_block, split = work_item(item, row_blocks, num_splits, S.group)
        row = row_block * 2 * S.rows
        for column in range(split * S.split, min(split * S.split + S.split, V), S.columns):
            for k in range(0, S.D, S.depth):
                slot = step % S.stages
                full = ready.index(slot)
                mbarrier.wait(empty.index(slot), (step // S.stages + 1) % 2)
                mbarrier.expect(full, 2 * hidden.nbytes_per_cta + weight.nbytes_per_cta)
                tma.async_copy_global_to_shared(hidden, [row, k], full, a.index(2 * slot))
                tma.async_copy_global_to_shared(hidden, [row + S.rows, k], full, a.index(2 * slot + 1))
                tma.async_copy_global_to_shared(weight, [column, k], full, b.index(slot), multicast=True)
                step += 1
    cluster_barrier()


@gluon.jit
def multiply_tile(CONSUMER: gl.constexpr, ring, step, S: gl.constexpr):
    """Return the logits [S.rows, S.columns] of the next tile, of whose rows each CTA has half, and the step after it.
    `ring`: slots of hidden and of weight, barriers of the ready ones, address of those of the empty ones."""
    a, b, ready, empty_offset = ring
    acc = gl.full([S.rows, S.columns], 0.0, gl.float32, ACCUMULATOR)
    for k in range(0, S.D, S.depth):
        slot = step % S.stages
        mbarrier.wait(ready.index(slot), step // S.stages % 2)
        x, w = a.index(2 * slot + CONSUMER), b.index(slot).permute((1, 0))
        acc = warpgroup_mma(x, w, acc, use_acc=k > 0, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])  # the step before this has read its slot
        if k > 0:
            release(empty_offset + (step - 1) % S.stages * 8)
        step += 1
    logits = warpgroup_mma_wait(0, deps=[acc])
    release(empty_offset + (step - 1) % S.stages * 8)  # ptxas puts it behind what follows
    return logits, step


@gluon.jit
def new_ring(hidden, weight, S: gl.constexpr):
    """Return the slots of hidden (two for each step) and of weight, and the barriers of those that are ready and
    empty."""
    b = gl.allocate_shared_memory(weight.dtype, [S.stages, S.columns, S.depth], weight.layout)
    a = gl.allocate_shared_memory(hidden.dtype, [2 * S.stages, S.rows, S.depth], hidden.layout)
    ready = mbarrier.allocate_mbarrier(batch=S.stages)
    empty = mbarrier.allocate_mbarrier(batch=S.stages)
    for slot in gl.static_range(gl.constexpr(S.stages)):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=S.arrivals)
    mbarrier.fence_init_release_cluster()
    return a, b, ready, empty


@gluon.jit
def invalidate_ring(ready, empty, S: gl.constexpr):
    for slot in gl.static_range(gl.constexpr(S.stages)):
        mbarrier.invalidate(ready.index(slot))
        mbarrier.invalidate(empty.index(slot))


@functools.cache
def empty_offset(compiled: CompiledKernel) -> int:
    """Return where in shared memory the compiled kernel keeps the barriers of its empty slots, which lie side by
    side."""
    ptx = compiled.asm["ptx"]
    addresses = re.findall(rf"mbarrier\.init\.shared::cta\.b64 \[(%\w+)\], {ARRIVALS};", ptx)
    added = dict(re.findall(r"add\.s32\s+(%\w+), %\w+, (\d+);", ptx))
    offsets = sorted(int(added[address]) for address in addresses)
    assert offsets == list(range(offsets[0], offsets[-1] + 8, 8)), offsets
    return offsets[0]


def tiles_of(x: torch.Tensor, rows: int, columns: int, divided: bool) -> TensorDescriptor:
    """Return a descriptor of x in blocks of [rows, columns], of whose rows each CTA gets half (`divided`) or all."""
    halves = [[1, 0]] if divided else [[0, 0]]
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], LOGITS[x.dtype], cga_layout=halves)
    return TensorDescriptor.from_tensor(x, [rows, columns], layout)


def launch(
    kernel: GluonJITFunction, hidden: torch.Tensor, weight: torch.Tensor, S: Settings, *arguments: Any, **options: Any
) -> None:
    """Launch a kernel on hidden [N, D] and weight [V, D]."""
    (N, _), V = hidden.shape, len(weight)
    num_splits = triton.cdiv(V, S.split)
    grid = (min(triton.cdiv(N, 2 * S.rows) * num_splits, multiprocessors(hidden.device) // 2),)
    matrices = tiles_of(hidden, S.rows, S.depth, divided=True), tiles_of(weight, S.columns, S.depth, divided=False)
    options |= {"N": N, "V": V, "num_splits": num_splits, "S": S, "num_warps": 4, "num_ctas": 2}
    compiled = kernel.warmup(*matrices, *arguments, **options, empty_offset=0, grid=grid)
    kernel[grid](*matrices, *arguments, **options, empty_offset=empty_offset(compiled))
