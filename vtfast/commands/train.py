"""`vtfast train`, and `python train.py`."""

from __future__ import annotations

from collections.abc import Sequence

from vtfast.commands.settings import read_settings
from vtfast.config import Config


def run(arguments: Sequence[str]) -> int:
    what = "Train a vision-language model with GRPO."
    config = read_settings(arguments, Config, prog="train.py", description=what)
    if config is None:
        return 0

    from transformers.utils import logging as transformers_logging

    from vtfast.trainer import Trainer

    transformers_logging.disable_progress_bar()
    Trainer(config).run()
    return 0
