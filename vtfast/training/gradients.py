"""The gradients of a step, where ZeRO-2 keeps them between the last backward pass and the optimizer.

Of DeepSpeed's insides no other file knows anything. Checked against 0.19.8 (`runtime/zero/stage_1_and_2.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def global_norm(engine: DeepSpeedEngine) -> float:
    """Norm of the gradients of all ranks, before clipping; nan where it is not finite. Collective.

    It is what `engine.step()` computes and decides by: DeepSpeed 0.19.8 leaves out the step itself, for fp32 and bf16,
    moves neither AdamW nor the schedule, and keeps the loss scale of 1. But by then the gradients are gone that say
    where it began, and a loss that is not finite beside finite gradients passes.
    """
    norm = float(engine.optimizer.scaled_global_norm())
    return norm if norm >= 0 else float("nan")  # DeepSpeed masks what is not finite with -1


def nonfinite_gradients(engine: DeepSpeedEngine) -> list[str]:
    """Names of the weights whose gradient, or what of it lies with this rank, is not finite."""
    names = {id(weight): name for name, weight in engine.module.module.named_parameters()}
    return [names[id(w)] for w, grad in _shares(engine) if not bool(grad.isfinite().all())]


def _shares(engine: DeepSpeedEngine) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """(weight, this rank's share of its gradient), once the last pass of a step is through."""
    zero = engine.optimizer
    for group, gradients in zero.averaged_gradients.items():
        real = (g for g in gradients or () if not getattr(g, "_zero_padding", False))
        yield from zip(zero.params_in_partition[group], real, strict=False)  # padding may follow


def drop_gradients(engine: DeepSpeedEngine) -> None:
    """As if no pass of the step had run, whether the last one came to its end or not.

    A backward pass that fails leaves gradients in buckets that were to be reduced together, marks of those that were
    reduced already, and the depth of a pass that is never left.
    """
    zero = engine.optimizer
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # a reduction that is under way still reads its bucket
    for bucket in zero.ipg_buckets.values():
        bucket.clear()
    zero.extra_large_param_to_reduce.clear()
    zero.previous_reduced_grads.clear()
    zero.params_already_reduced[:] = [False] * len(zero.params_already_reduced)
    for sums in (zero.averaged_gradients, zero.all_grad_tensors):
        for group in sums:
            sums[group] = None
    zero._release_ipg_buffers()
    zero.zero_grad(set_to_none=True)
    while zero._backward_active_depth:
        zero.exit_backward()
