"""Names of the losses. Imports no torch, so that a program can check its settings before it loads torch."""

from typing import Literal, get_args

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
SamplerMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
"""What is done with tokens or sequences whose importance weight leaves its bounds."""

LOSS_TYPES: tuple[str, ...] = get_args(LossType)
SAMPLER_MODES: tuple[str, ...] = get_args(SamplerMode)
TOKEN_LEVEL = ("cispo", "sapo", "vespo")
"""Losses without a clip. They have one importance per token; "sequence" is not defined for them."""
