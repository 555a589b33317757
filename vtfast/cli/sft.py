"""`vtfast sft`."""

from __future__ import annotations

from collections.abc import Sequence

from vtfast.cli.config_flags import read_settings
from vtfast.config import SFTConfig


def run(arguments: Sequence[str]) -> int:
    what = "Fine-tune a vision-language model on the answers of its data (supervised)."
    config = read_settings(arguments, SFTConfig, prog="vtfast sft", description=what)
    if config is None:
        return 0

    from transformers.utils import logging as transformers_logging

    from vtfast.training.sft import SFTTrainer

    transformers_logging.disable_progress_bar()
    SFTTrainer(config).run()
    return 0
