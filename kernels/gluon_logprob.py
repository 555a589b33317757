"""`linear_logprob`'s forward for sm_90 in Gluon: warp-specialised, the weight multicast to two CTAs.

A cluster of two CTAs takes 256 tokens through a vocabulary split in tiles of 256 columns. In each CTA 4
producer warps copy tiles of `hidden` (128 rows of its own) and of `weight` (256 columns, one copy for both)
by TMA into a ring of `STAGES` slots. Two groups of 4 consumer warps, of 64 rows each, multiply them by m64n256k16 and
keep the statistics of their rows, which are those of `logprob_kernel`, as are the splits and the sum over them.

Why: 128 x 128 tiles ask the L2 for a byte per 64 FLOPs, which is 11 TB/s at 700 TF/s and more than it gives; this
asks for a byte per 128. The ring goes on through the ends of tiles, so that copies never pause, and a consumer may be
two steps ahead of the other: part of the exponentials of one run under the matmul of the other. An estimate of what
that brings: from 60-72% of the tensor cores' rate to 75-85%. Not measured, never run on a GPU; `impl="gluon"` alone
chooses it.

A slot is free when both CTAs have read it, because the copy writes into both. Triton 3.7 has no arrival at
another CTA's barrier, so RELEASE is PTX: one lane of each of the 2 x 2 x 4 consumer warps arrives at both CTAs'
barriers. It needs the barriers' address, which is read from the compiled kernel (`empty_offset`).
"""

import functools
import re

import torch
import triton
from triton.compiler import CompiledKernel
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import cluster, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .chunks import multiprocessors, work_item
from .online_softmax import LOG2_E, LOGITS, LOWEST, online

STAGES = 4  # 48 KB each
ROWS, COLUMNS, DEPTH = 128, 256, 64  # of a consumer's tile in both CTAs, and of a step
GROUP = 24  # blocks of 256 rows that go through all splits together
ARRIVALS = 16  # at a slot's barrier: consumer warps of both CTAs

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
def producer(
    hidden,
    weight,
    a,
    b,
    ready,
    empty,
    plan,
    D: gl.constexpr,
    SPLIT: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Fill the ring's slots in the order in which the consumers use them."""
    ROWS: gl.constexpr = hidden.block_type.shape[0]
    COLUMNS: gl.constexpr = weight.block_type.shape[0]
    DEPTH: gl.constexpr = weight.block_type.shape[1]
    N, V, num_splits = plan
    row_blocks = gl.cdiv(N, 2 * ROWS)
    step = 0
    cluster_barrier()
    for item in range(gl.program_id(0), row_blocks * num_splits, gl.num_programs(0)):
        row_block, split = work_item(item, row_blocks, num_splits, GROUP)
        row = row_block * 2 * ROWS
        for column in range(split * SPLIT, min(split * SPLIT + SPLIT, V), COLUMNS):
            for k in range(0, D, DEPTH):
                slot = step % STAGES
                full = ready.index(slot)
                mbarrier.wait(empty.index(slot), (step // STAGES + 1) % 2)
                mbarrier.expect(full, 2 * hidden.nbytes_per_cta + weight.nbytes_per_cta)
                tma.async_copy_global_to_shared(hidden, [row, k], full, a.index(2 * slot))
                tma.async_copy_global_to_shared(hidden, [row + ROWS, k], full, a.index(2 * slot + 1))
                tma.async_copy_global_to_shared(weight, [column, k], full, b.index(slot), multicast=True)
                step += 1
    cluster_barrier()


@gluon.jit
def consumer(
    CONSUMER: gl.constexpr,
    a,
    b,
    ready,
    empty_offset,
    target_ptr,
    out,
    plan,
    inv_temperature,
    D: gl.constexpr,
    SPLIT: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    ENTROPY: gl.constexpr,
    ROUND: gl.constexpr,
):
    """Multiply, and keep the statistics of ROWS rows, of which each CTA has half."""
    ROWS: gl.constexpr = a.type.shape[1]
    COLUMNS: gl.constexpr = b.type.shape[1]
    DEPTH: gl.constexpr = b.type.shape[2]
    BY_ROW: gl.constexpr = gl.SliceLayout(1, ACCUMULATOR)
    BY_COLUMN: gl.constexpr = gl.SliceLayout(0, ACCUMULATOR)
    scale = inv_temperature * LOG2_E
    N, V, num_splits = plan
    row_blocks = gl.cdiv(N, 2 * ROWS)
    step = 0
    cluster_barrier()
    for item in range(gl.program_id(0), row_blocks * num_splits, gl.num_programs(0)):
        row_block, split = work_item(item, row_blocks, num_splits, GROUP)
        offs_n = (2 * row_block + CONSUMER) * ROWS + gl.arange(0, ROWS, BY_ROW)
        in_n = offs_n < N
        target = gl.load(target_ptr + offs_n, mask=in_n, other=-1).to(gl.int32)
        top = gl.full([ROWS], LOWEST, gl.float32, BY_ROW)
        total = gl.full([ROWS], 0.0, gl.float32, BY_ROW)
        mean = gl.full([ROWS], 0.0, gl.float32, BY_ROW)
        target_logit = gl.full([ROWS], 0.0, gl.float32, BY_ROW)
        for column in range(split * SPLIT, min(split * SPLIT + SPLIT, V), COLUMNS):
            acc = gl.full([ROWS, COLUMNS], 0.0, gl.float32, ACCUMULATOR)
            for k in range(0, D, DEPTH):
                slot = step % STAGES
                mbarrier.wait(ready.index(slot), step // STAGES % 2)
                x, w = a.index(2 * slot + CONSUMER), b.index(slot).permute((1, 0))
                acc = warpgroup_mma(x, w, acc, use_acc=k > 0, is_async=True)
                acc = warpgroup_mma_wait(1, deps=[acc])  # the step before this has read its slot
                if k > 0:
                    release(empty_offset + (step - 1) % STAGES * 8)
                step += 1
            z = warpgroup_mma_wait(0, deps=[acc])
            release(empty_offset + (step - 1) % STAGES * 8)  # ptxas puts it behind the exponentials
            offs_v = column + gl.arange(0, COLUMNS, BY_COLUMN)
            z = gl.where((offs_v < V)[None, :], z.to(ROUND).to(gl.float32), LOWEST)
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
    D: gl.constexpr,
    SPLIT: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    ARRIVALS: gl.constexpr,
    ENTROPY: gl.constexpr,
    ROUND: gl.constexpr,
):
    """`hidden` and `weight` are tensor descriptors. Every warp belongs to one of the three parts, because all have to
    take part in `cluster_barrier`."""
    ROWS: gl.constexpr = hidden.block_type.shape[0]
    COLUMNS: gl.constexpr = weight.block_type.shape[0]
    DEPTH: gl.constexpr = weight.block_type.shape[1]
    b = gl.allocate_shared_memory(weight.dtype, [STAGES, COLUMNS, DEPTH], weight.layout)
    a = gl.allocate_shared_memory(hidden.dtype, [2 * STAGES, ROWS, DEPTH], hidden.layout)
    ready = mbarrier.allocate_mbarrier(batch=STAGES)
    empty = mbarrier.allocate_mbarrier(batch=STAGES)
    for slot in gl.static_range(STAGES):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=ARRIVALS)
    mbarrier.fence_init_release_cluster()
    out = (max_ptr, sum_ptr, mean_ptr, target_logit_ptr)
    plan = (N, V, num_splits)
    gl.warp_specialize(
        [
            (
                consumer,
                (
                    0,
                    a,
                    b,
                    ready,
                    empty_offset,
                    target_ptr,
                    out,
                    plan,
                    inv_temperature,
                    D,
                    SPLIT,
                    GROUP,
                    STAGES,
                    ENTROPY,
                    ROUND,
                ),
            ),
            (
                consumer,
                (
                    1,
                    a,
                    b,
                    ready,
                    empty_offset,
                    target_ptr,
                    out,
                    plan,
                    inv_temperature,
                    D,
                    SPLIT,
                    GROUP,
                    STAGES,
                    ENTROPY,
                    ROUND,
                ),
            ),
            (producer, (hidden, weight, a, b, ready, empty, plan, D, SPLIT, GROUP, STAGES)),
        ],
        [4, 4],
        [232, 40],
    )
    for slot in gl.static_range(STAGES):
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
    assert offsets == list(range(offsets[0], offsets[0] + 8 * STAGES, 8)), offsets
    return offsets[0]


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
    (N, D), V = hidden.shape, len(weight)
    num_splits = triton.cdiv(V, split)
    clusters = min(triton.cdiv(N, 2 * ROWS) * num_splits, multiprocessors(hidden.device) // 2)
    dtype = LOGITS[hidden.dtype]
    shapes = ((hidden, [ROWS, DEPTH], [[1, 0]]), (weight, [COLUMNS, DEPTH], [[0, 0]]))
    matrices = [
        TensorDescriptor.from_tensor(x, shape, gl.NVMMASharedLayout.get_default_for(shape, dtype, cga_layout=halves))
        for x, shape, halves in shapes
    ]
    numbers = {"N": N, "V": V, "num_splits": num_splits, "inv_temperature": inv_temperature}
    constants = {"D": D, "SPLIT": split, "GROUP": GROUP, "STAGES": STAGES, "ARRIVALS": ARRIVALS}
    options = {"ENTROPY": entropy, "ROUND": dtype, "num_warps": 4, "num_ctas": 2}
    arguments = (*matrices, target, *out)
    offset = empty_offset(
        gluon_logprob_kernel.warmup(*arguments, **numbers, empty_offset=0, **constants, **options, grid=(clusters,))
    )
    gluon_logprob_kernel[(clusters,)](*arguments, **numbers, empty_offset=offset, **constants, **options)
