"""The estimate before a run, beside what a run really holds."""

from dataclasses import replace

import pytest
import torch
from model_2b import changed, drawn_2b, memory, settings
from transformers import Qwen2Config

from bench._harness import growth_in_child
from vtfast.config import SFTConfig, load_config
from vtfast.cost.activations import (
    activation_bytes,
    loss_bytes,
    saved_per_patch,
    saved_per_token,
    vision_activation_bytes,
)
from vtfast.cost.largest_step import workload_of
from vtfast.cost.memory import (
    cache_bytes,
    count_parameters,
    estimate_memory,
    fused_weight_bytes,
    gradient_bytes,
    optimizer_bytes,
)
from vtfast.model.loading import load_model, read_model_config
from vtfast.model.meta_model import meta_policy_for_run
from vtfast.model.policy import Policy
from vtfast.rollout import RolloutEngine, Sampling
from vtfast.trainer import Trainer
from vtfast.training.load_balancing import StepBatches

# -------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    "changes", [{}, {"freeze": "vision"}, {"freeze": "embeddings,merger"}, {"freeze": "language"}, {"use_peft": True}]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_are_those_of_the_loaded_model(random_path, changes, dtype):
    config = settings(model=random_path, dtype=dtype, **changes)
    if config.use_peft:
        pytest.importorskip("peft")
    drawn = meta_policy_for_run(read_model_config(random_path), config, getattr(torch, dtype))
    real = load_model(random_path, dtype, freeze=config.freeze)
    if config.use_peft:
        from vtfast.model.adapters import add_lora

        add_lora(real, config.lora_r, config.lora_alpha, config.lora_target_modules)
    shapes = [
        [(n, p.shape, p.dtype, p.requires_grad) for n, p in policy.module.named_parameters()]
        for policy in (drawn, real)
    ]
    assert shapes[0] == shapes[1] and all(p.is_meta for p in drawn.module.parameters())
    parts = count_parameters(drawn)
    assert sum(p.parameters for p in parts) == sum(p.numel() for p in real.module.parameters())
    assert sum(p.bytes for p in parts) == sum(p.nbytes for p in real.module.parameters())
    trained = {p.name for p in parts if p.trained}
    everything = {"vision", "merger", "language", "embeddings"}
    gone = {"language", "embeddings"} if config.freeze == ["language"] else set(config.freeze)
    assert trained == ({"adapters"} if config.use_peft else everything - gone)


def test_parameters_of_qwen2_vl_2b():
    """4,417,971,200 bytes of bf16 weights are what its checkpoint's index says."""
    parts = {part.name: part for part in count_parameters(drawn_2b())}
    assert sum(part.bytes for part in parts.values()) == 4_417_971_200
    assert parts["embeddings"].parameters == 151936 * 1536  # tied: counted once


# -------------------------------------------------------------------------------- what a run holds


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_optimizer_and_gradients_are_the_engines(tmp_path, dtype, monkeypatch):
    config = settings(dtype=dtype, per_device_train_batch_size=2, output_dir=str(tmp_path / "run"))
    trainer = Trainer(config)
    seen = []

    def step(engine=trainer.session.engine, real=trainer.session.engine.step):
        gradients = engine.optimizer.averaged_gradients[0]
        seen.append(sum(g.nbytes for g in gradients if g.dtype == torch.float32))
        real()

    monkeypatch.setattr(trainer.session.engine, "step", step)
    trainer.session.updater.update(1, StepBatches([empty_micro_batch(trainer)], 1, 1, 0.0), 1, 1)
    trainer.scorer.close()
    optimizer = trainer.session.engine.optimizer
    (master,) = optimizer.single_partition_of_fp32_groups
    state = optimizer.optimizer.state[master]
    held = master.nbytes + state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes
    parts = count_parameters(trainer.session.policy)
    trained = sum(part.trained for part in parts)
    assert master.data_ptr() != optimizer.bit16_groups_flat[0].data_ptr(), "a copy in fp32 as well"
    assert held == optimizer_bytes(trained, ranks=1)
    width = trainer.session.policy.head.element_size()
    assert seen == [gradient_bytes(parts, ranks=1, device_type="cpu") - trained * width]


def empty_micro_batch(trainer: Trainer):
    """It has the gradients of a full one."""
    from vtfast.training.groups import MicroBatch

    return MicroBatch([], {}, trainer.session.policy)


def test_ranks_share_the_optimizer_and_the_sums_but_not_the_buckets():
    assert optimizer_bytes(1001, ranks=2) == 501 * 12
    parts = count_parameters(drawn_2b())
    one, two = (gradient_bytes(parts, ranks, "cuda") for ranks in (1, 2))
    assert one - two == 2_208_985_600 // 2 * 4
    assert one - 2_208_985_600 * 4 == 3 * 100_000_000 * 2  # two buckets and one of them flattened, in bf16


@pytest.mark.parametrize("rows", [512, 4])
def test_the_cache_and_the_joined_weights_are_the_rollouts(random_path, policy, prompts, rows):
    prompts = [prompts[3]] * 3
    P, C, G = len(prompts[0].ids), 20, 4
    engine = RolloutEngine(policy, max_rows=rows)
    engine.generate(prompts, G, Sampling(max_new_tokens=C))
    config = settings(
        model=random_path, max_prompt_length=P, num_generations=G, per_device_train_batch_size=3, rollout_max_rows=rows
    )
    cache, decoder = engine.workspace.cache, engine.workspace.decoder
    load = workload_of(config, has_images=True)
    full, least = cache_bytes(policy, config, load, "cpu")
    assert full == cache.keys.nbytes + cache.values.nbytes and (least < full) == (rows == 512)
    fused = [part for layer in decoder.layers for part in (layer._qkv, layer._gate_up)]
    held = sum(x.nbytes for part in fused for x in (part.weight, part.bias) if x is not None)
    assert fused_weight_bytes(policy) == held > 0


def test_a_given_cache_and_a_full_device_bound_the_cache(random_path, policy):
    config = settings(model=random_path, rollout_cache_tokens=16_000)
    given, least = cache_bytes(policy, config, workload_of(config, True), "cpu")
    assert given == least == 1001 * 2 * 3 * 16 * 2 * 24 * 4  # pages, K and V, layers, tokens, heads, head size, fp32
    config = settings(model=random_path)
    load = workload_of(config, True)
    full, least = cache_bytes(policy, config, load, "cpu")
    held_out = settings(model=random_path, eval_data="synthetic")
    assert cache_bytes(policy, held_out, load, "cpu")[0] > full, "32 questions at once"
    roomy = estimate_memory(policy, config, 1, "cpu", 10**12)
    assert roomy.cache == roomy.full_cache == full
    others = replace(roomy, cache=0).peak
    half = estimate_memory(policy, config, 1, "cpu", int((others + full / 2) / 0.9))
    assert half.cache == pytest.approx(full / 2) and half.peak <= 0.9 * (others + full / 2) / 0.9
    assert estimate_memory(policy, config, 1, "cpu", others // 2).cache == least, "one group always has room"
    asleep = config.model_copy(update={"rollout_keep_cache": False})
    between = estimate_memory(policy, asleep, 1, "cpu", int(others / 0.9))
    assert between.cache > half.cache, "in place of the update's memory"


# ------------------------------------------------------------------------------------- activations


def kept_by(policy: Policy, config, groups: int) -> int:
    """Bytes that the trunk keeps for the backward of `groups` groups at their limit, without the weights."""
    from PIL import Image

    from vtfast.data import Processor
    from vtfast.data.prompt_templates import IMAGE

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
            kept[storage.data_ptr()] = (storage.nbytes(), x)  # x, so that the address is not used again
        return x

    row = policy.pack([prompt] * groups, [answers] * groups)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        policy.hidden_states(row)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("freeze", ["none", "vision"])
@pytest.mark.parametrize("shape", [(100, 20, 4), (60, 150, 2), (200, 7, 8)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_near_what_autograd_keeps(random_path, checkpointing, freeze, shape):
    """Within 15%, less the one layer and block that the estimate adds for its gradients or for running it again."""
    P, C, G = shape
    config = settings(
        model=random_path,
        max_prompt_length=P,
        max_completion_length=C,
        num_generations=G,
        freeze=freeze,
        max_pixels=28 * 28 * 36,
        per_device_train_batch_size=2,
        gradient_checkpointing=checkpointing,
    )
    policy = load_model(random_path, freeze=config.freeze)
    if checkpointing:
        policy.module.gradient_checkpointing_enable({"use_reentrant": False})
        policy.module.train()
    load = workload_of(config, has_images=True)
    assert (load.prompts_per_micro_batch, load.tokens) == (2, 2 * (P + G * C))
    layer = 4 * load.tokens * saved_per_token(policy, config, load, "cpu")
    block = 4 * 2 * 36 * 4 * saved_per_patch(policy, config, "cpu") * (freeze == "none")
    pixels = 2 * 36 * 4 * 1176 * 4
    guess = activation_bytes(policy, config, load, "cpu") - (1 + checkpointing) * layer
    guess += vision_activation_bytes(policy, config, load, "cpu") - (1 + checkpointing) * block
    guess -= pixels * (freeze == "none")  # one copy: the weights are fp32 as well
    real = kept_by(policy, config, groups=2)
    assert real / 1.15 < guess < real * 1.15, guess / real


UPDATE = """
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from bench._harness import measure_growth
from vtfast.config import load_config
from vtfast.training.groups import MicroBatch, Group
from vtfast.model import Policy
from vtfast.training.grpo_objective import GRPOObjective, loss_spec
from vtfast.cost.micro_batches import GroupPart
from vtfast.data.prompt import Prompt
from vtfast.data.prompt_builder import EncodedSample
from vtfast.rollout import Completion

config = load_config(overrides={overrides!r})
policy = Policy(Qwen2ForCausalLM(Qwen2Config(**{model!r})).eval(), ())
P, C, G = config.max_prompt_length, config.max_completion_length, config.num_generations
prompt = Prompt(torch.arange(P), torch.arange(P).expand(3, -1))
answers = [Completion(list(range(C)), [-1.0] * C, "length") for _ in range(G)]
group = Group(EncodedSample(None, prompt), answers, advantage=torch.linspace(-1, 1, G))
batch = MicroBatch([GroupPart(0, tuple(range(G)), P + G * C, 1.0)], {{0: group}}, policy)
objective = GRPOObjective(policy, loss_spec(config))
for p in policy.module.parameters():
    p.grad = torch.zeros_like(p)  # the engine's, which the estimate counts elsewhere
measure_growth(lambda: objective(batch, G, G * C)[0].backward())
"""


@pytest.mark.slow
@pytest.mark.parametrize("V", [2_000, 60_000])
def test_an_updates_memory_is_near_what_a_process_grows_by(V):
    """Resident memory of a forward and backward, chiefly the layers' or chiefly the loss's: within a factor of 1.5."""
    model = {
        "vocab_size": V,
        "hidden_size": 128,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
    overrides = {
        "max_prompt_length": 200,
        "max_completion_length": 100,
        "num_generations": 8,
        "per_device_train_batch_size": 1,
    }
    config = load_config(overrides=overrides)
    drawn = meta_policy_for_run(Qwen2Config(**model), config, torch.float32)
    load = workload_of(config, has_images=False)
    guess = activation_bytes(drawn, config, load, "cpu") + loss_bytes(drawn, load.scored, "cpu")
    real = 1e6 * 1.048576 * growth_in_child(UPDATE.format(overrides=overrides, model=model))
    assert real / 1.5 < guess < real * 1.5, guess / real


# --------------------------------------------------------------------------- what a pass is, and what fits


def test_a_pass_is_what_packing_makes_of_it():
    P, C, G = 100, 10, 8  # a group is 180 tokens
    common = {
        "max_prompt_length": P,
        "max_completion_length": C,
        "num_generations": G,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
    }
    load = workload_of(settings(**common), has_images=True)
    assert (load.tokens, load.prompts_per_micro_batch, load.micro_batches, load.scored) == (720, 4, 2, 320)
    assert load.key_rows == 4 * 100 + 32 * 110 and load.image == 20 and load.prompts == 8
    assert load.images_per_micro_batch == 720 // 108, "more prompts fit when completions are short"
    small = workload_of(settings(**common, token_budget=130), has_images=False)
    assert (small.tokens, small.prompts_per_micro_batch, small.scored, small.image) == (130, 1, 30, 0)
    least = workload_of(settings(**common, token_budget=50), has_images=False)
    assert least.tokens == 110, "a prompt with one completion goes alone, whatever the budget"
    most = workload_of(settings(**common, token_budget=10**6), has_images=False)
    assert (most.tokens, most.micro_batches) == (8 * 180, 1), "no more than the step has"
    supervised = workload_of(load_config("tiny-spatial-sft", kind=SFTConfig), has_images=True)
    assert supervised.group == 1 and supervised.tokens == 32 * (1024 + 32)


def test_what_each_setting_does_to_the_memory():
    base = memory(changed(beta=0.04))
    assert base.weights == base.reference == 4_417_971_200
    assert base.peak == base.standing + max(base.update, base.rollout) > 4 * base.weights
    assert memory(changed()).reference == 0
    assert memory(changed(beta=0.04, offload_reference=True)).reference == 0
    assert memory(changed(beta=0.04, use_peft=True)).reference == 0
    frozen = memory(changed(beta=0.04, freeze="vision"))
    assert frozen.weights - frozen.reference == 631_183_360 * 2, "frozen weights are shared"
    assert frozen.vision_activations < base.vision_activations / 20
    again = memory(changed(beta=0.04, gradient_checkpointing=True))
    assert again.activations < base.activations / 5 and again.loss == base.loss
    assert memory(changed(rollout_keep_cache=False)).standing < memory(changed()).standing
    half = memory(changed(beta=0.04, rollout_max_rows=8))
    assert half.cache < base.cache < memory(changed(beta=0.04, num_generations=16)).cache
    vllm = {"use_vllm": True, "vllm_gpu_memory_utilization": 0.5}
    assert memory(changed(**vllm)).rollout == 40e9 and memory(changed(**vllm)).fused_weights == 0
    awake = memory(changed(**vllm, vllm_enable_sleep_mode=False))
    assert awake.standing - memory(changed(**vllm)).standing == 40e9
    frozen_head = memory(changed(beta=0.04, freeze="embeddings"))
    assert base.loss - frozen_head.loss == 151936 * 1536 * (4 + 2), "fp32, and its copy in bf16"
    assert base.loss < 2.4e9, "of which one chunk of logits is at most 2^30 bytes"
    many = changed(beta=0.04, gradient_accumulation_steps=64)
    assert memory(many).prefill == 8 * base.prefill, "16 prompts of 1,024 tokens are read at once, not 2"
    assert memory(changed(), ranks=8).optimizer * 2 == memory(changed(), ranks=4).optimizer
