"""A gather of rows by index whose backward is exact and deterministic.

PyTorch's own backward of `x[index]` adds with atomics on CUDA: in bf16 it rounds after every addition, and its order
changes from run to run. Here each row's uses are known beforehand, so they are summed in a fixed order in fp32.

Shapes: T rows of the source, M rows gathered.
"""

from __future__ import annotations

import torch
from torch import Tensor


class RowGather:
    """`gather(x [T, ...]) -> x[index] [M, ...]`. Negative entries of `index` are padding: they read row 0 and pass no
    gradient back."""

    def __init__(self, index: Tensor, rows: int, device: torch.device | str = "cpu") -> None:
        """`index`: [M] int64 on the CPU; `rows`: T."""
        self.rows = rows
        output_row = torch.nonzero(index >= 0).squeeze(1)
        source_row = index[output_row]
        output_row = output_row[torch.argsort(source_row, stable=True)]  # grouped by source row
        count = torch.bincount(source_row, minlength=rows)
        first = count.cumsum(0) - count
        used = torch.nonzero(count).squeeze(1)
        # Most used rows first: those that have a u-th use are then the first few.
        used = used[torch.argsort(count[used], descending=True, stable=True)]
        self.index = index.clamp(min=0).to(device)
        self._used = used.to(device)
        self._uses: list[Tensor] = []
        """[u]: output rows that are the u-th use of the first `len(_uses[u])` rows of `_used`."""
        for u in range(int(count.max()) if rows else 0):
            rows_u = used[count[used] > u]
            self._uses.append(output_row[first[rows_u] + u].to(device))

    def __call__(self, x: Tensor) -> Tensor:
        return _Gather.apply(x, self)

    def backward(self, grad: Tensor) -> Tensor:
        """[M, ...] -> [T, ...]: the sum over each row's uses."""
        out = grad.new_zeros(self.rows, *grad.shape[1:])
        if not self._uses:
            return out
        total = grad.index_select(0, self._uses[0])
        if len(self._uses) > 1:
            several = len(self._uses[1])
            summed = total[:several].float()
            for output_row in self._uses[1:]:
                summed[: len(output_row)] += grad.index_select(0, output_row)
            total[:several] = summed.to(total.dtype)
        return out.index_copy_(0, self._used, total)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gather: RowGather) -> Tensor:
        ctx.gather = gather
        return x.index_select(0, gather.index)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.gather.backward(grad), None
