"""Rotate the queries and keys of one new token per row, and write its key and value into their page, for decode.

    q_r, k_r, v_r = split(qkv_r)
    rotate(a)     = a * cos_r + swap(a) * sin_r           swap: halves exchanged, the second one negated (Llama's RoPE)
    pages[slot_r] = rotate(k_r), v_r                      out_r = rotate(q_r)

Qwen2-VL's M-RoPE has three axes; after the prompt they are equal, so one angle per row is exact. The angle is not the
slot in the cache: an image takes fewer positions than tokens.

Bytes: 2 R (H + 2 K) d elements.   Tolerance: fp32 within 1e-5 of float64; half precision rounds once.
Measured on a GPU: not yet.

Shapes: R rows, H query heads, K key heads, d head size, B pages in the pool.
"""

import torch
import triton
import triton.language as tl

from .checks import check_rope, checks_skipped, choose_impl, op_scope


@triton.jit
def rope_append_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    slot_ptr,
    query_ptr,
    keys_ptr,
    values_ptr,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per row and head of queries, keys or values."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    lane = tl.arange(0, BLOCK_D)
    in_d = lane < D
    start = qkv_ptr + (row * (H + 2 * K) + head) * D
    x = tl.load(start + lane, mask=in_d, other=0.0)
    slot = tl.load(slot_ptr + row)
    if head >= H + K:
        tl.store(values_ptr + (slot * K + head - H - K) * D + lane, x, mask=in_d)
    else:
        half = D // 2
        other = tl.load(start + tl.where(lane < half, lane + half, lane - half), mask=in_d, other=0.0)
        sign = tl.where(lane < half, -1.0, 1.0)
        offset = row * D + lane
        cos = tl.load(cos_ptr + offset, mask=in_d, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + offset, mask=in_d, other=0.0).to(tl.float32)
        rotated = (x.to(tl.float32) * cos + sign * other.to(tl.float32) * sin).to(x.dtype)
        if head < H:
            tl.store(query_ptr + (row * H + head) * D + lane, rotated, mask=in_d)
        else:
            tl.store(keys_ptr + (slot * K + head - H) * D + lane, rotated, mask=in_d)


@op_scope
@torch.no_grad()
def rope_append(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slot: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    impl: str = "auto",
) -> torch.Tensor:
    """Return rotated queries, and write rotated keys, and values, into the pages. No gradient.

    Args:
        qkv: [R, (H + 2 K) d], heads of queries, keys and values one after the other.
        cos: [R, d] of each row's angle, the same in both halves.
        sin: [R, d].
        slot: [R] int64, token of the pool that the row writes; if rows share one, either's is left there.
        keys: [B, page_size, K, d], written in place.
        values: [B, page_size, K, d], written in place.
        impl: auto | triton | torch | reference.

    Returns:
        [R, H, d].
    """
    impl = choose_impl(impl, qkv, "qkv")
    if not checks_skipped():
        check_rope(qkv, cos, sin, slot, keys, values, impl)
    K, d = keys.shape[2:]
    R, H = len(qkv), qkv.shape[1] // d - 2 * K
    if impl == "triton":
        query = qkv.new_empty(R, H, d)
        if R:
            rope_append_kernel[(R, H + 2 * K)](
                qkv.contiguous(),
                cos.contiguous(),
                sin.contiguous(),
                slot,
                query,
                keys,
                values,
                H=H,
                K=K,
                D=d,
                BLOCK_D=triton.next_power_of_2(d),
                num_warps=1,
            )
        return query
    if impl == "reference":
        from . import reference

        return reference.rope_append(qkv, cos, sin, slot, keys, values)
    qk, v = qkv.unflatten(1, (-1, d)).split([H + K, K], dim=1)
    sin = sin[:, None, : d // 2]
    rotated = qk * cos[:, None]
    rotated[..., : d // 2].addcmul_(qk[..., d // 2 :], sin, value=-1)
    rotated[..., d // 2 :].addcmul_(qk[..., : d // 2], sin)
    keys.flatten(0, 1).index_copy_(0, slot, rotated[:, H:])
    values.flatten(0, 1).index_copy_(0, slot, v)
    return rotated[:, :H]
