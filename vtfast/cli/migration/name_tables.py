"""What each name of the others means here. Sources: their code and launch scripts, TRL 1.16's `GRPOConfig`.

A rule is a name of ours (the value carries over), `Drop(reason)`, or a function of the value -> ({ours: value}, note).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from vtfast.config.fields import Schedule

SCHEDULES = get_args(Schedule)
Mapped = tuple[dict[str, Any], str]


AS_FUNCTION = "give a function of (completion, sample) as --reward_funcs module:function"


@dataclass(frozen=True)
class Drop:
    reason: str


Rule = str | Drop | Callable[[Any], Mapped]


def _is_true(value: Any) -> bool:
    return str(value).lower() in ("1", "true", "yes", "on")


def _switch(ours: str) -> Rule:
    return lambda value: ({ours: _is_true(value)}, "")


def _to(note: str, **settings: Any) -> Rule:
    """These settings if the switch is on."""
    return lambda value: (settings if _is_true(value) else {}, note if _is_true(value) else "off, as here")


def _rewards(value: Any) -> Mapped:
    names = value if isinstance(value, list) else str(value).replace(",", " ").split()
    known = {
        "accuracy": "accuracy",
        "accuracy_reward": "accuracy",
        "format": "format",
        "format_reward": "format",
        "think_format_reward": "format",
        "length": "length",
    }
    ours = [known[name] for name in names if name in known]
    others = [name for name in names if name not in known]
    note = (
        f"not here: {', '.join(others)}; give a function of (completion, sample) as module:function" if others else ""
    )
    return ({"reward_funcs": ours} if ours else {}), note


def _fp16(value: Any) -> Mapped:
    return {}, "bfloat16 on GPUs instead: fp16 is not trained here" if _is_true(value) else "off, as here"


def _bf16(value: Any) -> Mapped:
    return {"dtype": "bfloat16" if _is_true(value) else "float32"}, ""


def _max_steps(value: Any) -> Mapped:
    return ({"max_steps": value}, "") if int(value) > 0 else ({}, "-1 leaves it to the epochs")


def _loggers(value: Any) -> Mapped:
    names = value if isinstance(value, list) else [value]
    ours = [name for name in map(str, names) if name in ("wandb", "tensorboard", "trackio", "none")]
    return {"report_to": ours or ["tensorboard"]}, "" if len(ours) == len(names) else "the console shows a progress bar"


def _schedule(value: Any) -> Mapped:
    if value in SCHEDULES:
        return {"lr_scheduler_type": value}, ""
    if str(value).startswith("cosine"):
        return {"lr_scheduler_type": "cosine"}, "falls to zero here, over all steps"
    return {}, f"not here; there are {', '.join(SCHEDULES)}"


def _per_question(value: Any) -> Mapped:
    scale = {"true": "group", "false": "none"}.get(str(value).lower(), value)
    return {"scale_rewards": scale}, ""


def _split_of_hub_id(value: Any) -> Mapped:
    """EasyR1's `owner/name@split`."""
    data, _, split = str(value).partition("@")
    return {"data": data} | ({"split": split} if split else {}), ""


def _held_out(value: Any) -> Mapped:
    data, _, split = str(value).partition("@")
    return {"eval_data": data, "eval_split": split or "val"}, ""


def _modules(value: Any) -> Mapped:
    """Names between blanks, commas, or both: TRL's own examples say `"q_proj", "v_proj"`."""
    if value is None:
        return {}, "not set"
    words = value if isinstance(value, list) else [value]
    names = [name for word in words for name in re.split(r"[,\s]+", str(word)) if name]
    return {"lora_target_modules": names}, ""


def _positive(ours: str) -> Rule:
    return lambda value: ({ours: value}, "") if int(value) > 0 else ({}, "off there")


COLOCATED = Drop("vLLM runs colocated on each rank's GPU")
AUTOMATIC = Drop("chosen automatically, and logged")
ALWAYS = Drop("ZeRO-2 always, through DeepSpeed; there is no file to write")
BEFORE_AND_AFTER = Drop("--eval_data is evaluated before and after training")
EVERY_STEP = Drop("every step is logged")
WITH_FILES = Drop("checkpoints are whole; nothing to choose")
SHUFFLED = Drop("every epoch is shuffled again")
OURS_DIFFERS = Drop("has no counterpart: prompts are packed without padding, and workers are not needed")
RUN_FOLDER = Drop("a run is named after its folder: --output_dir")
WITHIN = Drop("give the file itself: vtfast migrate FILE")
NO_REMOTE_CODE = Drop("code of a checkpoint is never run")
NO_HUB = Drop("nothing is uploaded; checkpoints are ordinary Hugging Face folders, `hf upload` takes them")

TRL: Mapping[str, Rule] = {
    "model_name_or_path": "model",
    "model": "model",
    "output_dir": "output_dir",
    "dataset_name": "data",
    "dataset_train_split": "split",
    "max_prompt_length": "max_prompt_length",
    "max_completion_length": "max_completion_length",
    "num_generations": "num_generations",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "beta": "beta",
    "epsilon": "epsilon",
    "epsilon_high": "epsilon_high",
    "delta": "delta",
    "loss_type": "loss_type",
    "importance_sampling_level": "importance_sampling_level",
    "num_iterations": "num_iterations",
    "reward_weights": "reward_weights",
    "scale_rewards": _per_question,
    "reward_funcs": _rewards,
    "learning_rate": "learning_rate",
    "lr_scheduler_type": _schedule,
    "warmup_steps": "warmup_steps",
    "weight_decay": "weight_decay",
    "adam_beta1": "adam_beta1",
    "adam_beta2": "adam_beta2",
    "adam_epsilon": "adam_epsilon",
    "max_grad_norm": "max_grad_norm",
    "max_steps": _max_steps,
    "seed": "seed",
    "save_steps": "save_steps",
    "save_total_limit": "save_total_limit",
    "report_to": _loggers,
    "min_pixels": "min_pixels",
    "max_pixels": "max_pixels",
    "use_peft": _switch("use_peft"),
    "lora_r": "lora_r",
    "lora_alpha": "lora_alpha",
    "lora_target_modules": _modules,
    "gradient_checkpointing": _switch("gradient_checkpointing"),
    "bf16": _bf16,
    "fp16": _fp16,
    "torch_dtype": "dtype",
    "dtype": "dtype",
    "use_liger_kernel": _switch("use_liger_kernel"),
    "use_vllm": _switch("use_vllm"),
    "vllm_gpu_memory_utilization": "vllm_gpu_memory_utilization",
    "vllm_enable_sleep_mode": _switch("vllm_enable_sleep_mode"),
    "vllm_importance_sampling_correction": _switch("vllm_importance_sampling_correction"),
    "vllm_importance_sampling_mode": "vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_max": "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min": "vllm_importance_sampling_clip_min",
    "freeze_vision": _to("there the flag did nothing; here it freezes", freeze=["vision"]),
    "freeze_vision_modules": _to("", freeze=["vision"]),
    "freeze_language": _to("", freeze=["language"]),
    "resume_from_checkpoint": Drop("give it at launch: --resume_from_checkpoint last"),
    "attn_implementation": AUTOMATIC,
    "deepspeed": ALWAYS,
    "fsdp": ALWAYS,
    "ddp_find_unused_parameters": ALWAYS,
    "zero_stage": ALWAYS,
    "logging_steps": EVERY_STEP,
    "logging_strategy": EVERY_STEP,
    "logging_first_step": EVERY_STEP,
    "log_completions": Drop("completions.jsonl always holds them, and report.html shows them"),
    "save_only_model": WITH_FILES,
    "save_strategy": WITH_FILES,
    "overwrite_output_dir": Drop("a run is never written over"),
    "run_name": RUN_FOLDER,
    "push_to_hub": NO_HUB,
    "hub_model_id": NO_HUB,
    "hub_strategy": NO_HUB,
    "hub_private_repo": NO_HUB,
    "remove_unused_columns": OURS_DIFFERS,
    "dataloader_num_workers": OURS_DIFFERS,
    "dataloader_pin_memory": OURS_DIFFERS,
    "pad_to_multiple_of": OURS_DIFFERS,
    "torch_empty_cache_steps": OURS_DIFFERS,
    "len_control": Drop("the length reward is `length` in --reward_funcs"),
    "eval_strategy": BEFORE_AND_AFTER,
    "eval_steps": BEFORE_AND_AFTER,
    "do_train": Drop("that is what train does"),
    "do_eval": BEFORE_AND_AFTER,
    "trust_remote_code": NO_REMOTE_CODE,
    "lora_dropout": Drop("adapters have no dropout here: sampler and trainer would not agree"),
    "disable_dropout": Drop("there is no dropout"),
    "optim": Drop("fused AdamW always"),
    "data_seed": Drop("--seed orders the data too"),
    "shuffle_dataset": SHUFFLED,
    "ds3_gather_for_generation": ALWAYS,
    "vllm_mode": COLOCATED,
    "vllm_device": COLOCATED,
    "sync_ref_model": Drop("the reference is always the starting model"),
    "mask_truncated_completions": Drop("not here: truncated completions are trained on, with their rewards"),
    "use_bias_correction_kl": Drop("the trainer's KL is uncorrected (the kernels have it: GRPOLoss)"),
    "top_entropy_quantile": Drop("not here: all tokens are trained on"),
    "config": WITHIN,
    "dataset_config": Drop("name the file or folder in --data"),
    "local_rank": Drop("the launcher's"),
}
"""Flags of TRL's GRPOTrainer and, through its forks of TRL 0.14, of R1-V and VisualThinker-R1-Zero."""

EASYR1: Mapping[str, Rule] = {
    "data.train_files": _split_of_hub_id,
    "data.prompt_key": "question_column",
    "data.answer_key": "answer_column",
    "data.image_key": "image_column",
    "data.max_prompt_length": "max_prompt_length",
    "data.max_response_length": "max_completion_length",
    "data.seed": "seed",
    "data.min_pixels": "min_pixels",
    "data.max_pixels": "max_pixels",
    "data.val_files": _held_out,
    "data.filter_overlong_prompts": Drop("prompts that are too long are skipped and listed"),
    "data.shuffle": SHUFFLED,
    "data.val_batch_size": AUTOMATIC,
    "data.format_prompt": Drop("a Jinja template there; write the text with its slots as --template FILE"),
    "algorithm.disable_kl": lambda value: ({"beta": 0.0} if _is_true(value) else {}, ""),
    "algorithm.kl_coef": "beta",
    "algorithm.use_kl_loss": lambda value: (
        {},
        "in the loss, as here" if _is_true(value) else "KL in the reward there; here it is in the loss",
    ),
    "algorithm.kl_penalty": lambda value: (
        {},
        "the same estimator (k3)"
        if value == "low_var_kl"
        else f"{value} there; here k3, which EasyR1 calls low_var_kl",
    ),
    "algorithm.adv_estimator": lambda value: (
        {},
        "" if value == "grpo" else f"{value} there; here advantages are GRPO's",
    ),
    "worker.actor.max_grad_norm": "max_grad_norm",
    "worker.actor.clip_ratio_low": "epsilon",
    "worker.actor.clip_ratio_high": "epsilon_high",
    "worker.actor.clip_ratio_dual": "delta",
    "worker.actor.model.model_path": "model",
    "worker.actor.model.enable_gradient_checkpointing": _switch("gradient_checkpointing"),
    "worker.actor.model.freeze_vision_tower": _to("", freeze=["vision"]),
    "worker.actor.model.trust_remote_code": NO_REMOTE_CODE,
    "worker.actor.optim.lr": "learning_rate",
    "worker.actor.optim.weight_decay": "weight_decay",
    "worker.actor.optim.strategy": lambda value: ({}, "fused AdamW with fp32 masters on the GPU"),
    "worker.actor.padding_free": Drop("always"),
    "worker.actor.micro_batch_size_per_device_for_update": Drop("micro-batches are sized by --token_budget"),
    "worker.actor.micro_batch_size_per_device_for_experience": Drop("micro-batches are sized by --token_budget"),
    "worker.actor.ulysses_sequence_parallel_size": Drop("no sequence parallelism here"),
    "worker.rollout.n": "num_generations",
    "worker.rollout.temperature": "temperature",
    "worker.rollout.top_p": "top_p",
    "worker.rollout.gpu_memory_utilization": "vllm_gpu_memory_utilization",
    "worker.rollout.tensor_parallel_size": Drop("each rank samples with its own weights"),
    "worker.rollout.enforce_eager": AUTOMATIC,
    "worker.rollout.enable_chunked_prefill": AUTOMATIC,
    "worker.rollout.limit_images": Drop("any number of images"),
    "worker.reward.score_function": Drop(AS_FUNCTION),
    "worker.reward.reward_function": Drop(AS_FUNCTION),
    "worker.reward.reward_type": Drop("functions only"),
    "trainer.max_steps": _positive("max_steps"),
    "trainer.save_freq": _positive("save_steps"),
    "trainer.save_limit": _positive("save_total_limit"),
    "trainer.save_checkpoint_path": "output_dir",
    "trainer.logger": _loggers,
    "trainer.load_checkpoint_path": Drop("give it at launch: --resume_from_checkpoint PATH"),
    "trainer.project_name": RUN_FOLDER,
    "trainer.experiment_name": RUN_FOLDER,
    "trainer.val_freq": BEFORE_AND_AFTER,
    "trainer.val_before_train": BEFORE_AND_AFTER,
    "trainer.val_only": Drop("`vtfast eval`"),
    "trainer.val_generations_to_log": EVERY_STEP,
    "config": WITHIN,
}
FOLDED = {
    "worker.actor.fsdp.": "ZeRO-2 in place of FSDP",
    "worker.actor.offload.": "ZeRO-2 in place of FSDP",
    "worker.ref.": "the reference shares frozen weights; --offload_reference true moves it off the GPU",
    "worker.rollout.val_override_config.": "held-out completions: once sampled, once greedy",
    "lr_scheduler_kwargs.": "schedules have no options here",
    "generation_kwargs.": "--top_k, --top_p, --min_p, --repetition_penalty",
    "model_init_kwargs.": "chosen automatically",
}
"""Sections whose settings all have the same outcome."""

COUNTED = {
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "generation_batch_size",
    "num_train_epochs",
    "warmup_ratio",
    "data.rollout_batch_size",
    "worker.actor.global_batch_size",
    "trainer.total_epochs",
    "trainer.total_episodes",
    "worker.actor.optim.lr_warmup_ratio",
    "trainer.n_gpus_per_node",
    "trainer.nnodes",
}
"""Settings that are only meaningful together (`mapping._count`)."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "trl": {
        "max_completion_length": 512,
        "seed": 42,
        "gradient_checkpointing": True,
        "save_steps": 500,
        "loss_type": "dapo",
        "report_to": ["none"],
        "per_device_train_batch_size": 8,
        "num_train_epochs": 3.0,
    },
    "r1-v": {
        "beta": 0.04,
        "max_prompt_length": 512,
        "max_completion_length": 256,
        "seed": 42,
        "save_steps": 500,
        "per_device_train_batch_size": 8,
        "num_train_epochs": 3.0,
    },
    "easyr1": {
        "beta": 0.01,
        "seed": 1,
        "epsilon_high": 0.3,
        "delta": 3.0,
        "loss_type": "dapo",
        "weight_decay": 0.01,
        "lr_scheduler_type": "constant",
        "num_generations": 5,
        "max_prompt_length": 2048,
        "max_completion_length": 2048,
        "min_pixels": 262144,
        "max_pixels": 4194304,
        "gradient_checkpointing": True,
    },
}
"""Their defaults that differ from vtfast's. EasyR1: its `examples/config.yaml`, which its launch lines start from."""
