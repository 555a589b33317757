"""Sizes of a language model's layers, read from its configuration."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class TextShape:
    """Sizes that FLOPs, memory and the rollout's cache follow from."""

    layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    query_heads: int
    kv_heads: int
    head_dim: int

    @property
    def query_width(self) -> int:
        return self.query_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def kv_numbers(self) -> int:
        """Numbers in the keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_width


def text_shape(config: PreTrainedConfig) -> TextShape:
    """`config`: of a whole model or of its language model."""
    text = getattr(config, "text_config", config)
    return TextShape(
        layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        vocab_size=text.vocab_size,
        query_heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        # Only some families' configurations have a head size of their own.
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
    )
