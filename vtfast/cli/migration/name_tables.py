"""What each name of the others means here. Sources: their code and launch scripts, TRL 1.16's `GRPOConfig`.

A rule is a name of ours (the value carries over), or a function of the value -> ({ours: value}, note).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, get_args

from vtfast.config import Config
from vtfast.config.fields import Schedule

SCHEDULES = get_args(Schedule)
REWARDS = ("accuracy", "accuracy_reward", "format", "format_reward", "think_format_reward", "length")
Mapped = tuple[dict[str, Any], str]


Rule = str | Callable[[Any], Mapped]


def _is_true(value: Any) -> bool:
    return str(value).lower() in ("1", "true", "yes", "on")


def _switch(ours: str) -> Rule:
    return lambda value: ({ours: _is_true(value)}, "")


def _to(note: str, **settings: Any) -> Rule:
    """These settings if the switch is on."""
    return lambda value: (settings if _is_true(value) else {}, note if _is_true(value) else "off, as here")


def _no_setting(reason: str) -> Rule:
    return lambda value: ({}, reason)


def _note_unless(same: str, otherwise: str, note: str = "") -> Rule:
    """No setting: `note` if the value is `same` as here, else `otherwise`, with the value in place of {}."""
    return lambda value: ({}, note if value == same else otherwise.format(value))


def _rewards(value: Any) -> Mapped:
    names = value if isinstance(value, list) else str(value).replace(",", " ").split()
    ours_by_name = {name: name.removeprefix("think_").removesuffix("_reward") for name in REWARDS}
    ours = [ours_by_name[name] for name in names if name in ours_by_name]
    others = [name for name in names if name not in ours_by_name]
    hint = f"not here: {', '.join(others)}; give a function of (completion, sample) as module:function"
    return ({"reward_funcs": ours} if ours else {}), hint if others else ""


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


ALWAYS = "ZeRO-2 always, through DeepSpeed; there is no file to write"
NO_HUB = "nothing is uploaded; checkpoints are ordinary Hugging Face folders, `hf upload` takes them"
NO_COUNTERPART = "has no counterpart: prompts are packed without padding, and workers are not needed"
AS_FUNCTION = "give a function of (completion, sample) as --reward_funcs module:function"
NO_REMOTE_CODE = "code of a checkpoint is never run"
BEFORE_AND_AFTER = "--eval_data is evaluated before and after training"
EVERY_STEP = "every step is logged"
SHUFFLED = "every epoch is shuffled again"
RUN_FOLDER = "a run is named after its folder: --output_dir"
AUTOMATIC = "chosen automatically, and logged"
WITHIN = "give the file itself: vtfast migrate FILE"


def _dropped(reason_of: Mapping[str, str]) -> dict[str, Rule]:
    """`reason_of`: names, with blanks between them -> why they are dropped."""
    return {name: _no_setting(reason) for names, reason in reason_of.items() for name in names.split()}


TRL: Mapping[str, Rule] = {
    **{name: _switch(name) if field.annotation is bool else name for name, field in Config.model_fields.items()},
    "model_name_or_path": "model",
    "dataset_name": "data",
    "dataset_train_split": "split",
    "scale_rewards": _per_question,
    "reward_funcs": _rewards,
    "lr_scheduler_type": _schedule,
    "max_steps": _max_steps,
    "report_to": _loggers,
    "lora_target_modules": _modules,
    "bf16": _bf16,
    "fp16": _fp16,
    "torch_dtype": "dtype",
    "freeze_vision": _to("there the flag did nothing; here it freezes", freeze=["vision"]),
    "freeze_vision_modules": _to("", freeze=["vision"]),
    "freeze_language": _to("", freeze=["language"]),
    **_dropped(
        {
            "resume_from_checkpoint": "give it at launch: --resume_from_checkpoint last",
            "deepspeed fsdp ddp_find_unused_parameters zero_stage ds3_gather_for_generation": ALWAYS,
            "logging_steps logging_strategy logging_first_step": EVERY_STEP,
            "log_completions": "completions.jsonl always holds them, and report.html shows them",
            "save_only_model save_strategy": "checkpoints are whole; nothing to choose",
            "overwrite_output_dir": "a run is never written over",
            "run_name": RUN_FOLDER,
            "push_to_hub hub_model_id hub_strategy hub_private_repo": NO_HUB,
            "remove_unused_columns dataloader_num_workers dataloader_pin_memory": NO_COUNTERPART,
            "pad_to_multiple_of torch_empty_cache_steps": NO_COUNTERPART,
            "len_control": "the length reward is `length` in --reward_funcs",
            "eval_strategy eval_steps do_eval": BEFORE_AND_AFTER,
            "do_train": "that is what train does",
            "trust_remote_code": NO_REMOTE_CODE,
            "lora_dropout": "adapters have no dropout here: sampler and trainer would not agree",
            "disable_dropout": "there is no dropout",
            "optim": "fused AdamW always",
            "data_seed": "--seed orders the data too",
            "shuffle_dataset": SHUFFLED,
            "attn_implementation": AUTOMATIC,
            "vllm_mode vllm_device": "vLLM runs colocated on each rank's GPU",
            "sync_ref_model": "the reference is always the starting model",
            "mask_truncated_completions": "not here: truncated completions are trained on, with their rewards",
            "use_bias_correction_kl": "the trainer's KL is uncorrected (the kernels have it: GRPOLoss)",
            "top_entropy_quantile": "not here: all tokens are trained on",
            "config": WITHIN,
            "dataset_config": "name the file or folder in --data",
            "local_rank": "the launcher's",
        }
    ),
}
"""Flags of TRL's GRPOTrainer and, through its forks of TRL 0.14, of R1-V and VisualThinker-R1-Zero. A name that vtfast
has too means the same in both, unless a later line says otherwise."""

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
    "algorithm.disable_kl": lambda value: ({"beta": 0.0} if _is_true(value) else {}, ""),
    "algorithm.kl_coef": "beta",
    "algorithm.use_kl_loss": lambda value: (
        {},
        "in the loss, as here" if _is_true(value) else "KL in the reward there; here it is in the loss",
    ),
    "algorithm.kl_penalty": _note_unless(
        "low_var_kl", "{} there; here k3, which EasyR1 calls low_var_kl", "the same estimator (k3)"
    ),
    "algorithm.adv_estimator": _note_unless("grpo", "{} there; here advantages are GRPO's"),
    "worker.actor.max_grad_norm": "max_grad_norm",
    "worker.actor.clip_ratio_low": "epsilon",
    "worker.actor.clip_ratio_high": "epsilon_high",
    "worker.actor.clip_ratio_dual": "delta",
    "worker.actor.model.model_path": "model",
    "worker.actor.model.enable_gradient_checkpointing": _switch("gradient_checkpointing"),
    "worker.actor.model.freeze_vision_tower": _to("", freeze=["vision"]),
    "worker.actor.optim.lr": "learning_rate",
    "worker.actor.optim.weight_decay": "weight_decay",
    "worker.rollout.n": "num_generations",
    "worker.rollout.temperature": "temperature",
    "worker.rollout.top_p": "top_p",
    "worker.rollout.gpu_memory_utilization": "vllm_gpu_memory_utilization",
    "trainer.max_steps": _positive("max_steps"),
    "trainer.save_freq": _positive("save_steps"),
    "trainer.save_limit": _positive("save_total_limit"),
    "trainer.save_checkpoint_path": "output_dir",
    "trainer.logger": _loggers,
    **_dropped(
        {
            "data.filter_overlong_prompts": "prompts that are too long are skipped and listed",
            "data.shuffle": SHUFFLED,
            "data.val_batch_size worker.rollout.enforce_eager worker.rollout.enable_chunked_prefill": AUTOMATIC,
            "data.format_prompt": "a Jinja template there; write the text with its slots as --template FILE",
            "worker.actor.model.trust_remote_code": NO_REMOTE_CODE,
            "worker.actor.optim.strategy": "fused AdamW with fp32 masters on the GPU",
            "worker.actor.padding_free": "always",
            "worker.actor.micro_batch_size_per_device_for_update": "micro-batches are sized by --token_budget",
            "worker.actor.micro_batch_size_per_device_for_experience": "micro-batches are sized by --token_budget",
            "worker.actor.ulysses_sequence_parallel_size": "no sequence parallelism here",
            "worker.rollout.tensor_parallel_size": "each rank samples with its own weights",
            "worker.rollout.limit_images": "any number of images",
            "worker.reward.score_function worker.reward.reward_function": AS_FUNCTION,
            "worker.reward.reward_type": "functions only",
            "trainer.load_checkpoint_path": "give it at launch: --resume_from_checkpoint PATH",
            "trainer.project_name trainer.experiment_name": RUN_FOLDER,
            "trainer.val_freq trainer.val_before_train": BEFORE_AND_AFTER,
            "trainer.val_only": "`vtfast eval`",
            "trainer.val_generations_to_log": EVERY_STEP,
            "config": WITHIN,
        }
    ),
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
