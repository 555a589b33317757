"""The settings of a loss: as a user writes them, as a kernel is compiled for them, and as a kernel's arguments."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from .checks import require
from .loss_types import LOSS_TYPES, SAMPLER_MODES, TOKEN_LEVEL


@dataclass(frozen=True)
class GRPOLoss:
    """A member of the GRPO family. Names are mostly TRL's; defaults are the VisualThinker recipe's."""

    loss_type: str = "grpo"
    """One of `LOSS_TYPES`."""
    beta: float = 0.04
    """Weight of the KL to the reference model; 0 never touches `ref_logp`."""
    epsilon_low: float = 0.2
    """Importance below 1 - epsilon_low is clipped."""
    epsilon_high: float | None = 0.2
    """Importance above 1 + epsilon_high is clipped; for cispo above epsilon_high itself. None = epsilon_low."""
    delta: float | None = None
    """Two-sided clipping: the unclipped branch stops growing at delta, which should exceed 1 + epsilon_high."""
    importance_level: str = "token"
    """token | sequence (GSPO). The losses of `TOKEN_LEVEL` have only "token"."""
    temperature: float = 1.0
    """Divides the logits, as it did in the sampler."""
    max_completion_length: int | None = None
    """The constant denominator of dr_grpo."""
    use_bias_correction_kl: bool = False
    """Multiply the KL by the importance (DeepSeek-V3.2): its gradient becomes the reverse KL's, unbiased."""
    sapo_temperature_pos: float = 1.0
    """Gate steepness for positive advantages."""
    sapo_temperature_neg: float = 1.05
    """Gate steepness for the others."""
    vespo_k_pos: float = 2.0
    """Power of W for advantages >= 0."""
    vespo_lambda_pos: float = 3.0
    """Decay in W for advantages >= 0."""
    vespo_k_neg: float = 3.0
    """Power of W for negative advantages."""
    vespo_lambda_neg: float = 2.0
    """Decay in W for negative advantages."""
    vllm_importance_sampling_mode: str = "sequence_mask"
    """How `sampler_logp` corrects: one ratio a token or a sequence; out of bounds it is clamped or zeroed."""
    vllm_importance_sampling_clip_max: float | None = 3.0
    """Upper bound of that ratio."""
    vllm_importance_sampling_clip_min: float | None = None
    """Lower bound of that ratio."""

    def __post_init__(self) -> None:
        def one_of(name: str, options: tuple[str, ...]) -> None:
            value = getattr(self, name)
            require(value in options, name, f"must be one of {', '.join(options)}, got {value!r}")

        def number(name: str, above: float = -math.inf, optional: bool = False) -> None:
            value = getattr(self, name)
            if not (optional and value is None):
                real = isinstance(value, (int, float)) and not isinstance(value, bool)
                require(real and math.isfinite(value), name, f"must be a finite number, got {value!r}")
                require(value > above, name, f"must be greater than {above}, got {value!r}")

        one_of("loss_type", LOSS_TYPES)
        one_of("importance_level", ("token", "sequence"))
        one_of("vllm_importance_sampling_mode", SAMPLER_MODES)
        if self.epsilon_high is None:
            object.__setattr__(self, "epsilon_high", self.epsilon_low)  # the dataclass is frozen
        for name in ("beta", "epsilon_low", "epsilon_high"):
            number(name)
            require(getattr(self, name) >= 0, name, "must not be negative")
        for name in ("temperature", "sapo_temperature_pos", "sapo_temperature_neg"):
            number(name, above=0)
        for name in ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"):
            number(name)
        for name in ("delta", "max_completion_length"):
            number(name, above=0, optional=True)
        for name in ("vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min"):
            number(name, optional=True)
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        ordered = low is None or high is None or low <= high
        require(ordered, "vllm_importance_sampling_clip_min", f"{low} is above clip_max, {high}")
        require(
            not (self.loss_type in TOKEN_LEVEL and self.importance_level == "sequence"),
            "importance_level",
            f"'sequence' is not defined for loss_type {self.loss_type!r}",
        )
        require(
            self.loss_type != "dr_grpo" or self.max_completion_length is not None,
            "max_completion_length",
            "must be given: it is the denominator of dr_grpo",
        )

    @property
    def sampler_per_sequence(self) -> bool:
        """Whether the sampler correction is one ratio per sequence."""
        return self.vllm_importance_sampling_mode.startswith("sequence")

    @property
    def sampler_masks(self) -> bool:
        """Whether a ratio out of bounds is zeroed instead of clamped."""
        return self.vllm_importance_sampling_mode.endswith("mask")

    def couples_tokens(self, has_sampler: bool) -> bool:
        """Whether a token's loss depends on the other tokens of its sequence."""
        sequence_loss = self.importance_level == "sequence" or self.loss_type == "vespo"
        return sequence_loss or (has_sampler and self.sampler_per_sequence)


class LossFlags(NamedTuple):
    """What a kernel is compiled for. Equal flags: the same kernel, whatever the numbers."""

    loss_type: str
    sequence_level: bool
    kl: bool
    unbiased_kl: bool
    delta: bool
    clip_max: bool
    clip_min: bool
    sampler_per_sequence: bool
    sampler_masks: bool
    coupled: bool
    """Whether a token's loss depends on the other tokens of its sequence."""

    @classmethod
    def of(cls, spec: GRPOLoss, has_sampler: bool) -> LossFlags:
        return cls(
            loss_type=spec.loss_type,
            sequence_level=spec.importance_level == "sequence",
            kl=spec.beta != 0,
            unbiased_kl=spec.beta != 0 and spec.use_bias_correction_kl,
            delta=spec.delta is not None and spec.loss_type not in TOKEN_LEVEL,
            clip_max=has_sampler and spec.vllm_importance_sampling_clip_max is not None,
            clip_min=has_sampler and spec.vllm_importance_sampling_clip_min is not None,
            sampler_per_sequence=has_sampler and spec.sampler_per_sequence,
            sampler_masks=has_sampler and spec.sampler_masks,
            coupled=spec.couples_tokens(has_sampler),
        )


class LossNumbers(NamedTuple):
    """The numbers of a loss: arguments of a kernel, so that annealing one compiles nothing."""

    beta: float
    low: float
    """Importance below is clipped."""
    high: float
    """Importance above is clipped."""
    delta: float
    clip_max: float
    clip_min: float
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float

    @classmethod
    def of(cls, spec: GRPOLoss) -> LossNumbers:
        assert spec.epsilon_high is not None, "GRPOLoss fills it in"
        return cls(
            beta=float(spec.beta),
            low=1.0 - spec.epsilon_low,
            high=float(spec.epsilon_high) if spec.loss_type == "cispo" else 1.0 + spec.epsilon_high,
            delta=float(spec.delta or 0.0),
            clip_max=float(spec.vllm_importance_sampling_clip_max or 0.0),
            clip_min=float(spec.vllm_importance_sampling_clip_min or 0.0),
            sapo_temperature_pos=float(spec.sapo_temperature_pos),
            sapo_temperature_neg=float(spec.sapo_temperature_neg),
            vespo_k_pos=float(spec.vespo_k_pos),
            vespo_lambda_pos=float(spec.vespo_lambda_pos),
            vespo_k_neg=float(spec.vespo_k_neg),
            vespo_lambda_neg=float(spec.vespo_lambda_neg),
        )
