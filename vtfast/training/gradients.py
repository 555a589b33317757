"""The gradients of a step, where ZeRO-2 keeps them between the last backward pass and the optimizer.

No other file uses DeepSpeed's internals. Checked against 0.19.8 (`runtime/zero/stage_1_and_2.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def global_norm(engine: DeepSpeedEngine) -> float:
    """Norm of the gradients of all ranks, before clipping; nan if it is not finite. Collective.

    `engine.step()` computes the same norm and skips the step if it is not finite. But it has dropped the gradients by
    then, which show where the problem began, and it does not look at the loss.
    """
    norm = float(engine.optimizer.scaled_global_norm())
    return norm if norm >= 0 else float("nan")  # DeepSpeed returns -1 for a norm that is not finite


def nonfinite_gradients(engine: DeepSpeedEngine) -> list[str]:
    """Names of the weights whose gradient, in this rank's partition, is not finite."""
    names = {id(weight): name for name, weight in engine.module.module.named_parameters()}
    return [names[id(w)] for w, grad in _shares(engine) if not bool(grad.isfinite().all())]


def _shares(engine: DeepSpeedEngine) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """(weight, this rank's partition of its gradient), after the last backward pass of a step."""
    zero = engine.optimizer
    for group, gradients in zero.averaged_gradients.items():
        real = (g for g in gradients or () if not getattr(g, "_zero_padding", False))
        yield from zip(zero.params_in_partition[group], real, strict=False)  # padding may follow


def optimizer_steps(engine: DeepSpeedEngine) -> int:
    """Steps that AdamW has begun."""
    return max((int(state["step"]) for state in engine.optimizer.optimizer.state.values()), default=0)


def drop_gradients(engine: DeepSpeedEngine) -> None:
    """Reset the engine to the state before the first micro-batch of the step, even if a pass or the optimizer failed.

    A failed backward pass leaves gradients in buckets that were to be reduced together, marks of those that were
    already reduced, and a nesting depth that is never decremented.
    """
    zero = engine.optimizer
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # a running reduction still reads its bucket
    for bucket in zero.ipg_buckets.values():
        bucket.clear()
    zero.extra_large_param_to_reduce.clear()
    zero.previous_reduced_grads.clear()
    zero.params_already_reduced[:] = [False] * len(zero.params_already_reduced)
    for sums in (zero.averaged_gradients, zero.all_grad_tensors):
        for group in sums:
            sums[group] = None
    for flat in zero.single_partition_of_fp32_groups:
        flat.grad = None
    zero._release_ipg_buffers()
    zero.zero_grad(set_to_none=True)
    while zero._backward_active_depth:
        zero.exit_backward()
