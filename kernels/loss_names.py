"""The names that a loss is chosen by. No torch here, so that a program can check its settings before it loads any."""

from typing import Literal, get_args

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
SamplerMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
"""What is done with tokens or sequences whose importance weight leaves its bounds."""

LOSS_TYPES: tuple[str, ...] = get_args(LossType)
SAMPLER_MODES: tuple[str, ...] = get_args(SamplerMode)
TOKEN_LEVEL = ("cispo", "sapo", "vespo")
"""Without a clip; their importance is a token's, and "sequence" is not defined for them."""
