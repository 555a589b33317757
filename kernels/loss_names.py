"""The names that a loss is chosen by. No torch here, so that a program can check its settings before it loads any."""

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
TOKEN_LEVEL = ("cispo", "sapo", "vespo")
"""Without a clip; their importance is a token's, and "sequence" is not defined for them."""
SAMPLER_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
