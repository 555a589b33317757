"""A GRPO trainer of the embedded default that steps in a second, and everything that a step moves."""

import pytest
import torch
from steps import scored

from vtfast.config import load_config
from vtfast.data import splits
from vtfast.data.batches import batches
from vtfast.trainer import Trainer


def make(folder, **overrides):
    few = {"eval_data": "none", "warmup_steps": 2, "max_steps": 6, "max_completion_length": 20}
    few |= {"per_device_train_batch_size": 4, "num_generations": 4, "learning_rate": 1e-3}
    settings = {"output_dir": str(folder), "token_budget": 200, **few}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "SYNTHETIC_TRAIN", 48)
        return Trainer(load_config(overrides=settings | overrides))


def asked(trainer, steps):
    session, count = trainer.session, trainer.config.per_device_train_batch_size
    return batches(session.prompt_builder, session.skip_log, session.train_samples, steps, per_rank=count)


def state(trainer):
    """Everything that an optimizer step moves."""
    zero = trainer.session.engine.optimizer
    tensors = {name: value.clone() for name, value in trainer.session.policy.module.named_parameters()}
    for number, kept in enumerate(zero.optimizer.state.values()):
        tensors |= {f"{number}/{name}": torch.as_tensor(value).clone() for name, value in kept.items()}
    for number, master in enumerate(zero.single_partition_of_fp32_groups):
        tensors[f"master/{number}"] = master.detach().clone()
    return tensors, trainer.session.engine.get_lr(), trainer.session.engine.lr_scheduler.state_dict()


def assert_same(one, other):
    assert one[1:] == other[1:]
    assert one[0].keys() == other[0].keys()
    for name, value in one[0].items():
        assert value.equal(other[0][name]), name


def answered(trainer, step=1):
    """Groups with rewards and advantages: what a step has before it cuts its batch."""
    return scored(trainer, next(asked(trainer, [step])), step)
