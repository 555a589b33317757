"""Matmuls 2 and 3 of `linear_grpo_loss`: the gradients of hidden states and head from those of the logits.

Shapes: N scored tokens, n tokens of a part of them, V vocabulary, C of its columns, D hidden.
"""

from __future__ import annotations

import torch

from .chunked_logits import add_matmul, matmul_over_vocabulary, scale_rows
from .loss_chunks import DLogits, LossInputs


class GradientMatmuls:
    """Both gradients of a batch, filled part by part. Each is None if it is not trained."""

    def __init__(self, inputs: LossInputs, weight: torch.Tensor) -> None:
        """`weight`: [V, D] as the gradients of the logits are to be multiplied with."""
        self.hidden, self.weight, self.impl = inputs.hidden, weight, inputs.impl
        # fp16 is rounded once, in the backward: after a loss scale it has no bits to spare
        self.dtype = torch.float32 if self.hidden.dtype == torch.float16 else self.hidden.dtype
        self.overwrite = len(self.hidden) > 0 and inputs.sparse_tau == 0
        """Whether the first product overwrites d_weight, and all tokens have their rows of d_hidden written."""
        new = torch.empty_like if self.overwrite else torch.zeros_like
        train_hidden, train_weight = inputs.needs_grad
        self.d_hidden = new(self.hidden, dtype=self.dtype) if train_hidden else None
        """[N, D]"""
        self.d_weight = new(inputs.weight, dtype=torch.float32) if train_weight else None
        """[V, D] fp32"""

    def add(self, rows: slice | torch.Tensor, part: DLogits) -> None:
        """Add the gradients of these n tokens, given those of their logits, [n, V]."""
        if self.d_hidden is not None:
            self._write(rows, matmul_over_vocabulary(part.d, self.weight), part.factor)
        if self.d_weight is not None:
            add_matmul(self.d_weight, part.d.t(), self._scaled_hidden(rows, part), self.overwrite)
        self.overwrite = False

    def add_columns(self, rows: torch.Tensor, columns: torch.Tensor, part: DLogits) -> None:
        """The same, given those of the logits of these C columns, all different, [n, C]; the others count as 0."""
        assert not self.overwrite
        if self.d_hidden is not None:
            self._write(rows, matmul_over_vocabulary(part.d, self.weight[columns]), part.factor)
        if self.d_weight is not None:
            product = matmul_over_vocabulary(part.d.t(), self._scaled_hidden(rows, part))
            self.d_weight.index_add_(0, columns, product)  # a row gets one summand: no order to vary

    def _write(self, rows: slice | torch.Tensor, product: torch.Tensor, factor: torch.Tensor | None) -> None:
        assert self.d_hidden is not None, "asked by the caller"
        product = product if factor is None else scale_rows(product, factor, self.dtype, self.impl)
        self.d_hidden[rows] = product.to(self.dtype)

    def _scaled_hidden(self, rows: slice | torch.Tensor, part: DLogits) -> torch.Tensor:
        x = self.hidden[rows]
        return x if part.factor is None else scale_rows(x, part.factor, part.d.dtype, self.impl)
