"""Qwen2-VL-2B without its weights, and what a run of it is estimated to take."""

import functools

import torch
from transformers import Qwen2VLConfig

from vtfast.config import load_config
from vtfast.cost.memory import estimate_memory
from vtfast.model.meta_model import meta_policy_for_run
from vtfast.model.policy import Policy

QWEN2_VL_2B = {  # Qwen/Qwen2-VL-2B's config.json
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "hidden_size": 1536},
}


def model_2b() -> Qwen2VLConfig:
    return Qwen2VLConfig(**QWEN2_VL_2B)


def settings(**overrides):
    few = {"eval_data": "none", "max_completion_length": 20, "warmup_steps": 0, "max_pixels": 28 * 28 * 20}
    return load_config(overrides=few | overrides)


def changed(**overrides):
    common = {
        "max_completion_length": 700,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_pixels": 401408,
        "eval_data": "none",
    }
    return load_config(overrides=common | overrides)


@functools.cache
def drawn_2b(freeze: tuple[str, ...] = (), use_peft: bool = False) -> Policy:
    config = settings(freeze=list(freeze), use_peft=use_peft)
    return meta_policy_for_run(model_2b(), config, torch.bfloat16)


def memory(config, ranks=4, gigabytes=80):
    drawn = drawn_2b(tuple(config.freeze), config.use_peft)
    return estimate_memory(drawn, config, ranks, "cuda", int(gigabytes * 1e9))
