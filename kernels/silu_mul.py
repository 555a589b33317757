"""silu(gate) * up of a fused projection, for decode.

Bytes: 3 R F elements.   Tolerance: fp32 within 1e-5 of float64; half precision equal to Hugging Face's layers, which
round silu(gate) before the product.
Measured on a GPU: not yet.

Shapes: R rows, F intermediate size.
"""

import torch
import triton
import triton.language as tl

from .checks import FLOATS, REFERENCE_FLOATS, check_tensor, checks_skipped, choose_impl, op_scope, require

BLOCK = 1024


@triton.jit
def silu_mul_kernel(gate_up_ptr, out_ptr, F, BLOCK: tl.constexpr):
    """One program per row and block of columns."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_f = column < F
    gate = tl.load(gate_up_ptr + row * 2 * F + column, mask=in_f, other=0.0)
    up = tl.load(gate_up_ptr + row * 2 * F + F + column, mask=in_f, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    out = silu.to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + row * F + column, out.to(gate.dtype), mask=in_f)


@op_scope
@torch.no_grad()
def silu_mul(gate_up: torch.Tensor, *, impl: str = "auto") -> torch.Tensor:
    """Return silu(gate) * up [R, F] of gate_up [R, 2 F], gates first. No gradient. impl: auto | triton | torch |
    reference."""
    impl = choose_impl(impl, gate_up, "gate_up")
    R, columns = gate_up.shape if gate_up.dim() == 2 else (0, 0)
    if not checks_skipped():
        dtypes = REFERENCE_FLOATS if impl == "reference" else FLOATS
        check_tensor("gate_up", gate_up, (None, None), dtypes, gate_up)
        even = columns % 2 == 0 and columns > 0
        require(even, "gate_up", f"must have two equal halves, got {columns} columns")
    if impl == "triton":
        out = gate_up.new_empty(R, columns // 2)
        if R:
            grid = (R, triton.cdiv(columns // 2, BLOCK))
            silu_mul_kernel[grid](gate_up.contiguous(), out, columns // 2, BLOCK=BLOCK)
        return out
    from . import reference  # two whole-tensor operations are fast enough on the CPU

    return reference.silu_mul(gate_up)
