"""DeepSpeed's ZeRO-2 engine. Only this module imports DeepSpeed, once the device is known."""

from __future__ import annotations

import logging
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import nn

from vtfast.config import RunConfig

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

REDUCE_BUCKET_SIZE = 100_000_000
"""Numbers in a gradient bucket. DeepSpeed's default of 5e8 takes 2.4 GB more in bf16, and its last all-reduce, which
nothing overlaps, is five times as long."""


def zero2_engine(config: RunConfig, objective: nn.Module) -> DeepSpeedEngine:
    """`objective` in ZeRO-2 with the AdamW, schedule and gradient clipping of `config`.

    bf16 weights get fp32 master weights; fp32 weights are trained directly."""
    from transformers import get_scheduler

    deepspeed = import_deepspeed()
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    cuda = trained[0].is_cuda
    optimizer = torch.optim.AdamW(
        trained,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )
    scheduler = get_scheduler(config.lr_scheduler_type, optimizer, config.warmup_steps, config.max_steps)
    settings = {
        "train_micro_batch_size_per_gpu": config.per_device_train_batch_size,
        "gradient_accumulation_steps": 1,  # the trainer marks the last micro-batch of a step
        "gradient_clipping": config.max_grad_norm,
        # `GuardedOptimizer` skips steps that are not finite; DeepSpeed's own scan would wait for the device once more
        "bf16": {"enabled": trained[0].dtype == torch.bfloat16, "check_grad_overflow": False},
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a step
        "data_types": {"grad_accum_dtype": "fp32"},  # bf16 sums over micro-batches would lose small gradients
        "zero_optimization": {
            "stage": 2,
            "overlap_comm": cuda,
            "contiguous_gradients": True,
            "reduce_bucket_size": REDUCE_BUCKET_SIZE,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(
        model=objective, model_parameters=trained, optimizer=optimizer, lr_scheduler=scheduler, config=settings
    )
    _create_adam_state(engine)
    return engine


def _create_adam_state(engine: DeepSpeedEngine) -> None:
    """What AdamW creates at its first step. It is here before the rollout sizes its cache, and memory that is too small
    for it is found at the start."""
    zero = engine.optimizer
    for flat in zero.single_partition_of_fp32_groups:
        zero.optimizer.state[flat] = {
            "step": torch.zeros((), dtype=torch.float32, device=flat.device),
            "exp_avg": torch.zeros_like(flat),
            "exp_avg_sq": torch.zeros_like(flat),
        }


def import_deepspeed() -> ModuleType:
    """DeepSpeed without its log. Call it once the device is known, because the import chooses the accelerator."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # DeepSpeed's shared-memory collectives for CPU ranks are C++, compiled at the first start for half a minute. gloo
    # needs no compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
