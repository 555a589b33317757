"""The estimate before a run, beside what a run really holds."""

import pytest
import torch
from transformers import Qwen2VLConfig

from vtfast.blueprint import blueprint, read_model_config
from vtfast.config import load_config
from vtfast.memory import (
    activation_bytes,
    block_numbers,
    cache_bytes,
    gradient_bytes,
    joined_bytes,
    layer_numbers,
    load_of,
    optimizer_bytes,
    parts_of,
    vision_activation_bytes,
)
from vtfast.model import Policy, load_model
from vtfast.rollout import RolloutEngine, Sampling
from vtfast.run import Run
from vtfast.trainer import Trainer

QWEN2_VL_2B = {  # Qwen/Qwen2-VL-2B's config.json
    "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
    "intermediate_size": 8960, "vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 32768,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "hidden_size": 1536},
}  # fmt: skip


def model_2b() -> Qwen2VLConfig:
    return Qwen2VLConfig(**QWEN2_VL_2B)


def settings(**overrides):
    few = {
        "eval_data": "none",
        "max_completion_length": 20,
        "warmup_steps": 0,
        "max_pixels": 28 * 28 * 20,
    }
    return load_config(overrides=few | overrides)


# -------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    "changes",
    [{}, {"freeze": "vision"}, {"freeze": "embeddings,merger"}, {"freeze": "language"}, {"use_peft": True}],
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_are_those_of_the_loaded_model(random_path, changes, dtype):
    config = settings(model=random_path, dtype=dtype, **changes)
    if config.use_peft:
        pytest.importorskip("peft")
    drawn = blueprint(read_model_config(random_path), config, getattr(torch, dtype))
    real = load_model(random_path, dtype, freeze=config.freeze)
    if config.use_peft:
        from vtfast.lora import add_lora

        add_lora(real, config.lora_r, config.lora_alpha, config.lora_target_modules)
    shapes = [
        [(n, p.shape, p.dtype, p.requires_grad) for n, p in policy.module.named_parameters()]
        for policy in (drawn, real)
    ]
    assert shapes[0] == shapes[1] and all(p.is_meta for p in drawn.module.parameters())
    parts = parts_of(drawn)
    assert sum(p.parameters for p in parts) == sum(p.numel() for p in real.module.parameters())
    assert sum(p.bytes for p in parts) == sum(p.nbytes for p in real.module.parameters())
    trained = {p.name for p in parts if p.trained}
    everything = {"vision", "merger", "language", "embeddings"}
    gone = {"language", "embeddings"} if config.freeze == ["language"] else set(config.freeze)
    assert trained == ({"adapters"} if config.use_peft else everything - gone)


def test_parameters_of_qwen2_vl_2b():
    """4,417,971,200 bytes of bf16 weights are what its checkpoint's index says."""
    parts = {
        part.name: part for part in parts_of(blueprint(model_2b(), settings(), torch.bfloat16))
    }
    assert sum(part.bytes for part in parts.values()) == 4_417_971_200
    assert parts["embeddings"].parameters == 151936 * 1536  # tied: counted once


# -------------------------------------------------------------------------------- what a run holds


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_optimizer_and_gradients_are_the_engines(tmp_path, dtype, monkeypatch):
    config = settings(dtype=dtype, per_device_train_batch_size=2, output_dir=str(tmp_path / "run"))
    trainer = Trainer(config)
    seen = []

    def step(engine=trainer.engine, real=trainer.engine.step):
        gradients = engine.optimizer.averaged_gradients[0]
        seen.append(sum(g.nbytes for g in gradients if g.dtype == torch.float32))
        real()

    monkeypatch.setattr(trainer.engine, "step", step)
    trainer.optimize([(group_of(trainer), 1, 1)])
    trainer.scorer.close()
    optimizer = trainer.engine.optimizer
    (master,) = optimizer.single_partition_of_fp32_groups
    state = optimizer.optimizer.state[master]
    held = master.nbytes + state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes
    parts = parts_of(trainer.policy)
    trained = sum(part.trained for part in parts)
    assert master.data_ptr() != optimizer.bit16_groups_flat[0].data_ptr(), "a copy in fp32 as well"
    assert held == optimizer_bytes(trained, ranks=1)
    width = trainer.policy.head.element_size()
    assert seen == [gradient_bytes(parts, ranks=1, kind="cpu") - trained * width]


def group_of(trainer: Run):
    """A pass with nothing in it: it has all the gradients of a full one."""
    from vtfast.groups import Batch

    return Batch([], {}, trainer.policy)


def test_ranks_share_the_optimizer_and_the_sums_but_not_the_buckets():
    assert optimizer_bytes(1001, ranks=2) == 501 * 12
    parts = parts_of(blueprint(model_2b(), settings(), torch.bfloat16))
    one, two = (gradient_bytes(parts, ranks, "cuda") for ranks in (1, 2))
    assert one - two == 2_208_985_600 // 2 * 4
    assert (
        one - 2_208_985_600 * 4 == 2 * 500_000_000 * 2
    )  # two buckets of DeepSpeed's default, in bf16


@pytest.mark.parametrize("rows", [512, 4])
def test_the_cache_and_the_joined_weights_are_the_rollouts(random_path, policy, prompts, rows):
    prompts = [prompts[3]] * 3
    P, C, G = len(prompts[0].ids), 20, 4
    engine = RolloutEngine(policy, max_rows=rows)
    engine.generate(prompts, G, Sampling(max_new_tokens=C))
    config = settings(
        model=random_path, max_prompt_length=P, num_generations=G, per_device_train_batch_size=3,
        rollout_max_rows=rows,
    )  # fmt: skip
    cache, decoder = engine.workspace.cache, engine.workspace.decoder
    load = load_of(config, has_images=True)
    assert cache_bytes(policy, config, load, "cpu", None) == cache.keys.nbytes + cache.values.nbytes
    joined = [part for layer in decoder.layers for part in (layer._qkv, layer._gate_up)]
    held = sum(x.nbytes for part in joined for x in (part.weight, part.bias) if x is not None)
    assert joined_bytes(policy) == held > 0


def test_a_given_cache_and_a_full_device_bound_the_cache(random_path, policy):
    config = settings(model=random_path, rollout_cache_tokens=16_000)
    given = cache_bytes(policy, config, load_of(config, True), "cpu", None)
    assert (
        given == 1001 * 2 * 3 * 16 * 2 * 24 * 4
    )  # pages, K and V, layers, tokens, heads, head size, fp32
    config = settings(model=random_path)
    load = load_of(config, True)
    wanted = cache_bytes(policy, config, load, "cpu", None)
    assert cache_bytes(policy, config, load, "cpu", wanted // 2) == wanted // 2
    held_out = settings(model=random_path, eval_data="synthetic")
    assert cache_bytes(policy, held_out, load, "cpu", None) > wanted, "32 questions at once"


# ------------------------------------------------------------------------------------- activations


def kept_by(policy: Policy, config, groups: int) -> int:
    """Bytes that the trunk keeps for the backward of `groups` groups at their limit, without the weights."""
    from PIL import Image

    from vtfast.data import Processor
    from vtfast.prompts import IMAGE

    processor = Processor.from_pretrained(config.model, config.min_pixels, config.max_pixels)
    side = int(config.max_pixels**0.5)
    prompt = processor.encode(IMAGE, [Image.new("RGB", (side, side))])
    text = processor.encode("a " * 500, []).ids[: config.max_prompt_length - len(prompt.ids)]
    marks = "".join(processor.tokenizer.decode([int(i)]) for i in text)
    prompt = processor.encode(IMAGE + marks, [Image.new("RGB", (side, side))])
    answers = [list(range(5, 5 + config.max_completion_length))] * config.num_generations
    weights = {p.untyped_storage().data_ptr() for p in policy.module.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (
                storage.nbytes(),
                x,
            )  # x, so that the address is not used again
        return x

    row = policy.pack([prompt] * groups, [answers] * groups)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        policy.trunk(row)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("freeze", ["none", "vision"])
@pytest.mark.parametrize("shape", [(100, 20, 4), (60, 150, 2), (200, 7, 8)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_near_what_autograd_keeps(random_path, checkpointing, freeze, shape):
    """Within 15%, less the one layer and block that the estimate adds for its gradients or for running it again."""
    P, C, G = shape
    config = settings(
        model=random_path, max_prompt_length=P, max_completion_length=C, num_generations=G, freeze=freeze,
        max_pixels=28 * 28 * 36, per_device_train_batch_size=2, gradient_checkpointing=checkpointing,
    )  # fmt: skip
    policy = load_model(random_path, freeze=config.freeze)
    if checkpointing:
        policy.module.gradient_checkpointing_enable({"use_reentrant": False})
        policy.module.train()
    load = load_of(config, has_images=True)
    assert (load.in_pass, load.tokens) == (2, 2 * (P + G * C))
    layer = 4 * load.tokens * layer_numbers(policy, config, load, "cpu")
    block = 4 * 2 * 36 * 4 * block_numbers(policy, config, "cpu") * (freeze == "none")
    pixels = 2 * 36 * 4 * 1176 * 4
    guess = activation_bytes(policy, config, load, "cpu") - (1 + checkpointing) * layer
    guess += vision_activation_bytes(policy, config, load, "cpu") - (1 + checkpointing) * block
    guess -= pixels * (freeze == "none")  # one copy: the weights are fp32 as well
    real = kept_by(policy, config, groups=2)
    assert real / 1.15 < guess < real * 1.15, guess / real
