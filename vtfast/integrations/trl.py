"""TRL's GRPOTrainer with the loss and the log-probs of these kernels: `use_fused_loss(trainer)`.

TRL 1.16 gets log-probs from a model by `model(..., labels=labels, fused_lm_head=True)`, through all wrappers (DDP,
DeepSpeed, peft). `use_fused_loss` replaces the model's forward: that call now runs `linear_logprob`, or, when the
trainer needs the loss of a batch, `linear_grpo_loss`, which computes the gradients in the same pass. Everything else is
TRL's: generation, rewards, advantages, metrics.

Shapes: B rows of a batch, L tokens of a row (prompt and completion, padded), T tokens of its completion, N scored
tokens.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import fields
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vtfast_kernels.grpo_loss import GRPOLoss, GRPOLossOutput
from vtfast_kernels.linear_grpo_loss import linear_grpo_loss
from vtfast_kernels.linear_logprob import linear_logprob

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from trl import GRPOTrainer

log = logging.getLogger("vtfast")
SUPPORTED = "1.16"
LossFn = Callable[[Tensor, Tensor, Tensor], GRPOLossOutput]
"""(hidden [N, D], weight [V, D], target [N]) -> the loss."""


def use_fused_loss(trainer: GRPOTrainer) -> GRPOTrainer:
    """Make a `trainer` compute its log-probs and its loss with these kernels; return it.

    The log-probs in any case. The loss too, unless the settings need what the kernels do not have
    (`top_entropy_quantile`, `off_policy_mask_threshold`, an entropy bonus, a router loss, vLLM's importance sampling):
    then TRL's own loss formula runs on the fused log-probs, and the log says so.

    Raises ValueError for a TRL other than 1.16, and for a head that is not a plain bias-free matmul with the whole
    weight on one device (soft-capped, scaled or fp32-cast logits, LoRA on the head, FSDP, ZeRO-3).
    """
    _check_version()
    for model in (trainer.model, trainer.ref_model):
        if model is not None:
            _replace_forward(_base(model), trainer)
    missing = _unsupported_options(trainer)
    if missing:
        log.warning("TRL's own loss formula runs on fused log-probs: the kernels lack %s", ", ".join(missing))
    else:
        trainer._compute_loss = functools.partial(_compute_loss, trainer)
    return trainer


def _check_version() -> None:
    installed = version("trl")
    if ".".join(installed.split(".")[:2]) != SUPPORTED:
        raise ValueError(
            f"trl: {installed} is installed; use_fused_loss supports {SUPPORTED} (pip install 'trl~={SUPPORTED}.0')"
        )


def _base(model: Any) -> PreTrainedModel:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _replace_forward(model: PreTrainedModel, trainer: GRPOTrainer) -> None:
    """Replace the `forward` that TRL gave the model by one that handles `fused_lm_head=True` with these kernels."""
    problem = _head_problem(model, trainer)
    if problem:
        raise ValueError(f"{type(model).__name__}: {problem}")
    original, temperature = model.forward, trainer.temperature

    @functools.wraps(original)  # `generate` validates its arguments against the signature
    def forward(*args: Any, fused_lm_head: bool = False, loss_of: LossFn | None = None, **kwargs: Any):
        if not fused_lm_head:
            return original(*args, **kwargs)
        return _fused_forward(model, temperature, loss_of, *args, **kwargs)

    model.forward = forward


def _head_problem(model: PreTrainedModel, trainer: GRPOTrainer) -> str | None:
    """Return why the kernels cannot compute the model's head, None if they can."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    options = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
    changed_by = [name for name in options if getattr(config, name, None) not in (None, 1.0)]
    if changed_by:
        return f"its logits are changed by {', '.join(changed_by)}"
    if type(head) is not nn.Linear or getattr(head, "bias", None) is not None:
        return f"its head is a {type(head).__name__}; it must be a bias-free nn.Linear"
    if trainer.args.cast_lm_head_to_fp32:
        return "cast_lm_head_to_fp32 is on; the kernels accumulate in fp32 anyway, so leave it out"
    if trainer.is_fsdp_enabled or hasattr(head.weight, "ds_id"):
        return "its weights are sharded (FSDP or ZeRO-3); use ZeRO-2 or DDP"
    return None


def _unsupported_options(trainer: GRPOTrainer) -> list[str]:
    """Return the options in use that the loss kernel does not have."""
    in_use = {
        "top_entropy_quantile": trainer.top_entropy_quantile < 1.0,
        "off_policy_mask_threshold": trainer.off_policy_mask_threshold is not None,
        "the entropy bonus": trainer._entropy_bonus_enabled,
        "the router loss": trainer.aux_loss_enabled,
        "vllm_importance_sampling_correction": trainer.use_vllm and trainer.vllm_importance_sampling_correction,
    }
    return [name for name, is_on in in_use.items() if is_on]


def _fused_forward(
    model: PreTrainedModel, temperature: float, loss_of: LossFn | None, *args: Any, labels: Tensor, **kwargs: Any
) -> Any:
    """Return TRL's FusedCausalLMOutput: `log_probs` and `entropy` [B, L - 1], 0 where the label [B, L] is -100; and the
    `loss` if `loss_of` is given."""
    from trl.trainer.utils import FusedCausalLMOutput

    hidden = model.base_model(*args, **kwargs, use_cache=False).last_hidden_state[:, :-1]
    labels = labels[:, 1:]
    scored = labels != -100
    weight = model.get_output_embeddings().weight
    rows, target = hidden[scored].to(weight.dtype), labels[scored]
    if loss_of is None:
        loss, (logp, entropy) = (None, linear_logprob(rows, weight, target, temperature=temperature, entropy=True))
    else:
        out = loss_of(rows, weight, target)
        loss, logp, entropy = out.loss, out.logp, out.entropy

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(scored.shape).masked_scatter(scored, values)

    return FusedCausalLMOutput(loss=loss, log_probs=spread(logp), entropy=spread(entropy), label_mask=scored)


def _compute_loss(trainer: GRPOTrainer, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Replaces TRL's method: the loss of a micro-batch from the kernel. TRL's own code then runs on the resulting
    log-probs, without gradients, for its metrics."""
    if inputs["advantages"].dim() != 1:
        raise ValueError("advantages: must be one number per completion, as in GRPOTrainer (subclasses may differ)")
    kept = inputs["completion_mask"] * inputs.get("tool_mask", 1)
    labels = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    T = kept.shape[1]
    scored = torch.cat([torch.zeros_like(inputs["prompt_mask"]), kept], 1) != 0

    def flat(name: str) -> Tensor | None:
        values = inputs.get(name)
        return None if values is None else values[kept != 0].float()

    spec = _spec(trainer)
    num_sequences, num_tokens = _denominators(trainer, inputs, kept)
    sequence = torch.arange(len(kept), device=kept.device)[:, None].expand_as(kept)[kept != 0]

    def loss_of(hidden: Tensor, weight: Tensor, target: Tensor) -> GRPOLossOutput:
        return linear_grpo_loss(
            hidden,
            weight,
            target,
            sequence,
            inputs["advantages"].float(),
            spec=spec,
            old_logp=flat("old_per_token_logps"),
            ref_logp=flat("ref_per_token_logps") if spec.beta else None,
            num_sequences=num_sequences,
            num_tokens=num_tokens,
        )

    image_inputs = ("pixel_values", "image_grid_thw", "mm_token_type_ids")
    images = {name: inputs[name] for name in image_inputs if inputs.get(name) is not None}
    with trainer.accelerator.autocast():
        out = model(
            input_ids=labels,
            attention_mask=attention,
            labels=labels.masked_fill(~scored, -100),
            fused_lm_head=True,
            loss_of=loss_of,
            **images,
        )
    logps_and_entropies = (out.log_probs[:, -T:].detach(), out.entropy[:, -T:].detach(), None)
    _log_metrics(trainer, model, inputs, logps_and_entropies)
    return out.loss


def _spec(trainer: GRPOTrainer) -> GRPOLoss:
    shared = {field.name for field in fields(GRPOLoss)} & set(vars(trainer.args))
    same = {name for name in shared if name.startswith(("sapo_", "vespo_"))}
    return GRPOLoss(
        loss_type=trainer.loss_type,
        beta=trainer.beta,
        epsilon_low=trainer.epsilon_low,
        epsilon_high=trainer.epsilon_high,
        delta=trainer.args.delta,
        importance_level=trainer.importance_sampling_level,
        temperature=trainer.temperature,
        max_completion_length=trainer.max_completion_length,
        use_bias_correction_kl=trainer.args.use_bias_correction_kl,
        **{name: getattr(trainer.args, name) for name in same},
    )


def _denominators(trainer: GRPOTrainer, inputs: Mapping[str, Any], kept: Tensor) -> tuple[float, Tensor]:
    """Return (sequences, tokens) that TRL divides a micro-batch's sums by: its share of the accumulated step."""
    training = trainer.model.training
    micro_batches = trainer.current_gradient_accumulation_steps if training else 1
    if trainer.loss_type in ("cispo", "dapo", "vespo"):
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
        if training:
            tokens = tokens * micro_batches / trainer.args.steps_per_generation
    else:
        tokens = kept.sum().clamp(min=1.0) * micro_batches
    return len(kept) * micro_batches, tokens


@torch.no_grad()
def _log_metrics(
    trainer: GRPOTrainer, model: nn.Module, inputs: Mapping[str, Any], logps_and_entropies: tuple[Tensor, Tensor, None]
) -> None:
    """Run TRL's own `_compute_loss` on these log-probs, for the metrics that it logs."""
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: logps_and_entropies
    try:
        type(trainer)._compute_loss(trainer, model, inputs)
    finally:
        del trainer._get_per_token_logps_and_entropies
