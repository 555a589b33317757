"""`vtfast train`, and `python train.py`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from vtfast.cli.config_flags import read_settings
from vtfast.config import Config


def run(arguments: Sequence[str]) -> int:
    what = "Train a vision-language model with GRPO."
    # train.py lies in the repository; an installed package has `vtfast train` alone.
    prog = "python train.py" if Path(sys.argv[0]).name == "train.py" else "vtfast train"
    config = read_settings(arguments, Config, prog=prog, description=what)
    if config is None:
        return 0

    from transformers.utils import logging as transformers_logging

    from vtfast.trainer import Trainer

    transformers_logging.disable_progress_bar()
    Trainer(config).run()
    return 0
