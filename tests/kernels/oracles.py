"""Losses that no one here wrote: TRL's and Liger's, fed with the flat batches of the tests.

TRL's loss is a method of its trainer; it runs here on a stand-in that holds the attributes it reads.
"""

from collections import defaultdict
from types import SimpleNamespace

import torch
from vtfast_kernels.grpo_loss import GRPOLoss

import vtfast  # noqa: F401  mends torchvision where it cannot load, before TRL asks for it

OURS_ALONE: tuple[str, ...] = ()
"""Loss types that neither TRL nor Liger has. For each, test_grpo_loss.py holds its value against one written by hand:
the registry's tests compare the derivative with the value, and two wrong ones may agree."""


class Padded:
    """The flat tokens of a batch laid out as [S, T] with a mask."""

    def __init__(self, sequence_id: torch.Tensor, S: int):
        count = torch.bincount(sequence_id, minlength=S)
        self.mask = torch.arange(int(count.max()), device=count.device) < count[:, None]

    def __call__(self, flat: torch.Tensor | None) -> torch.Tensor | None:
        if flat is None:
            return None
        out = flat.new_zeros(*self.mask.shape, *flat.shape[1:])
        return out.masked_scatter(self.mask.view(*self.mask.shape, *[1] * (flat.dim() - 1)), flat)


def sampler_ratio(spec: GRPOLoss, old: torch.Tensor, sampler: torch.Tensor) -> torch.Tensor:
    """The definition in TRL's documentation; TRL computes it while generating, out of reach of a test."""
    drift = old - sampler
    if "sequence" in spec.vllm_importance_sampling_mode:
        drift = drift.sum(-1, keepdim=True)
    ratio = drift.exp()
    low = spec.vllm_importance_sampling_clip_min
    high = spec.vllm_importance_sampling_clip_max
    low, high = -1.0 if low is None else low, float("inf") if high is None else high
    if "truncate" in spec.vllm_importance_sampling_mode:
        return ratio.clamp(low, high)
    return torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)


def trl_loss(logp, sequence_id, advantage, *, spec, old_logp=None, ref_logp=None, sampler_logp=None):
    """TRL 1.16's `GRPOTrainer._compute_loss` of the same tokens, differentiable in `logp`."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    pad = Padded(sequence_id, len(advantage))
    padded = pad(logp)
    old = padded.detach() if old_logp is None else pad(old_logp)
    args = SimpleNamespace(
        delta=spec.delta,
        use_bias_correction_kl=spec.use_bias_correction_kl,
        steps_per_generation=1,
        **{name: getattr(spec, name) for name in vars(spec) if name.startswith(("sapo", "vespo"))},
    )
    trainer = SimpleNamespace(
        args=args,
        loss_type=spec.loss_type,
        beta=spec.beta,
        epsilon_low=spec.epsilon_low,
        epsilon_high=spec.epsilon_high,
        importance_sampling_level=spec.importance_level,
        max_completion_length=spec.max_completion_length,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        use_vllm=sampler_logp is not None,
        vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=1,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x),
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *a, **k: (padded, torch.zeros_like(padded), None),
    )
    mask = pad.mask.to(logp.dtype)
    ids = torch.zeros_like(pad.mask, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": advantage,
        "old_per_token_logps": old,
        "ref_per_token_logps": pad(ref_logp),
        "num_items_in_batch": mask.sum(),
    }
    if sampler_logp is not None:
        ratio = sampler_ratio(spec, old, pad(sampler_logp))
        if spec.loss_type == "vespo" and ratio.shape[1] == mask.shape[1]:
            ratio = torch.where(pad.mask, ratio, 1.0)
        inputs["importance_sampling_ratio"] = ratio
    return GRPOTrainer._compute_loss(trainer, trainer.model, inputs)


def liger_loss(
    hidden, weight, target, sequence_id, advantage, *, spec, old_logp=None, ref_logp=None, sampler_logp=None
):
    """Liger's fused loss of the same tokens, differentiable in `hidden` and `weight`."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    pad = Padded(sequence_id, len(advantage))
    names = "sapo_temperature_pos sapo_temperature_neg vespo_k_pos vespo_k_neg vespo_lambda_pos vespo_lambda_neg"
    options = {name: getattr(spec, name) for name in names.split()}
    loss = LigerFusedLinearGRPOLoss(
        beta=spec.beta,
        compiled=False,
        use_ref_model=spec.beta != 0,
        epsilon_low=spec.epsilon_low,
        epsilon_high=spec.epsilon_high,
        loss_type=spec.loss_type,
        delta=spec.delta,
        max_completion_length=spec.max_completion_length,
        temperature=spec.temperature,
        importance_sampling_level=spec.importance_level,
        use_bias_correction_kl=spec.use_bias_correction_kl,
        **options,
    )
    ratio = None
    if sampler_logp is not None:
        ratio = sampler_ratio(spec, pad(old_logp), pad(sampler_logp))
    out = loss(
        pad(hidden),
        weight,
        pad(target),
        pad.mask.to(hidden.dtype),
        advantage,
        ref_per_token_logps=pad(ref_logp) if spec.beta != 0 else None,
        old_per_token_logps=pad(old_logp),
        vllm_is_ratio=ratio,
    )
    return out[0]
