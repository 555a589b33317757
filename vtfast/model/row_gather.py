"""Rows of a matrix picked by index, some of them several times, with a backward that is exact and repeatable.

PyTorch's own backward of `x[index]` adds with atomics on CUDA: in bf16 it rounds after every addition, and its order
changes from run to run. Here every row's uses are known beforehand, so they are summed in a fixed order in fp32.

Shapes: T rows of the source, M rows picked.
"""

from __future__ import annotations

import torch
from torch import Tensor


class RowGather:
    """`gather(x [T, ...]) -> x[index] [M, ...]`. Negative entries of `index` are padding: they take row 0, and no
    gradient flows back from them."""

    def __init__(self, index: Tensor, rows: int, device: torch.device | str = "cpu") -> None:
        """`index`: [M] int64 on the CPU; `rows`: T."""
        self.rows = rows
        place = torch.nonzero(index >= 0).squeeze(1)
        taken = index[place]
        by_row = torch.argsort(taken, stable=True)
        place = place[by_row]  # places in the output, row after row of the source
        count = torch.bincount(taken, minlength=rows)
        first = count.cumsum(0) - count
        used = torch.nonzero(count).squeeze(1)
        # Rows with the most uses first: the u-th uses of all rows are then those of the first few.
        used = used[torch.argsort(count[used], descending=True, stable=True)]
        self._index = index.clamp(min=0).to(device)
        self._used = used.to(device)
        self._uses = [
            place[first[rows_u] + u].to(device)
            for u in range(int(count.max()) if rows else 0)
            for rows_u in [used[count[used] > u]]
        ]

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
            for place in self._uses[1:]:
                summed[: len(place)] += grad.index_select(0, place)
            total[:several] = summed.to(total.dtype)
        return out.index_copy_(0, self._used, total)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gather: RowGather) -> Tensor:
        ctx.gather = gather
        return x.index_select(0, gather._index)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.gather.backward(grad), None
