"""A GRPO trainer with eight questions, quick to build and with any setting changed."""

import itertools

import pytest

from vtfast.config import load_config
from vtfast.data.batches import batches
from vtfast.trainer import Trainer


@pytest.fixture
def make(tmp_path):
    """(trainer, 8 questions) of the embedded default with some settings changed."""
    made = itertools.count()

    def build(**overrides):
        few = {"eval_samples": 8, "warmup_steps": 0, "max_steps": 4, "max_completion_length": 20}
        folder = str(tmp_path / f"run-{next(made)}")
        settings = few | {"per_device_train_batch_size": 8, "output_dir": folder}
        trainer = Trainer(load_config(overrides=settings | overrides))
        asked = batches(
            trainer.session.prompt_builder, trainer.session.skip_log, trainer.session.train_samples, [1], per_rank=8
        )
        return trainer, next(asked)

    return build
