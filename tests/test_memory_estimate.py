"""The estimate before a run, beside what a run really holds."""

import dataclasses
import functools

import pytest
import torch
import yaml
from transformers import Qwen2Config, Qwen2VLConfig

from bench._harness import growth_in_child
from vtfast.blueprint import blueprint, read_model_config
from vtfast.cli import main
from vtfast.config import SFTConfig, load_config
from vtfast.dry_run import Device, advice, count_rows, find_device
from vtfast.errors import UserError
from vtfast.load_balancing import Work
from vtfast.memory_estimate import (
    activation_bytes,
    block_numbers,
    cache_bytes,
    gradient_bytes,
    joined_bytes,
    layer_numbers,
    load_of,
    loss_bytes,
    memory_of,
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
    parts = {part.name: part for part in parts_of(drawn_2b())}
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
    trainer.optimize(Work([group_of(trainer)], 1, 1, 0.0), 1, 1)
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
    parts = parts_of(drawn_2b())
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


UPDATE = """
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from bench._harness import measure_growth
from vtfast.config import load_config
from vtfast.groups import Batch, Group
from vtfast.model import Policy
from vtfast.objective import Objective, loss_spec
from vtfast.packing import Part
from vtfast.processor import Prompt
from vtfast.questions import Question
from vtfast.rollout import Completion

config = load_config(overrides={overrides!r})
policy = Policy(Qwen2ForCausalLM(Qwen2Config(**{model!r})).eval(), ())
P, C, G = config.max_prompt_length, config.max_completion_length, config.num_generations
prompt = Prompt(torch.arange(P), torch.arange(P).expand(3, -1))
answers = [Completion(list(range(C)), [-1.0] * C, "length") for _ in range(G)]
group = Group(Question(None, prompt), answers, advantage=torch.linspace(-1, 1, G))
batch = Batch([Part(0, tuple(range(G)), P + G * C, 1.0)], {{0: group}}, policy)
objective = Objective(policy, loss_spec(config))
for p in policy.module.parameters():
    p.grad = torch.zeros_like(p)  # the engine's, which the estimate counts elsewhere
measure_growth(lambda: objective(batch, G, G * C)[0].backward())
"""


@pytest.mark.slow
@pytest.mark.parametrize("V", [2_000, 60_000])
def test_an_updates_memory_is_near_what_a_process_grows_by(V):
    """Resident memory of a forward and backward, chiefly the layers' or chiefly the loss's: within a factor of 1.5."""
    model = {
        "vocab_size": V, "hidden_size": 128, "intermediate_size": 1024, "num_hidden_layers": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    overrides = {"max_prompt_length": 200, "max_completion_length": 100, "num_generations": 8,
                 "per_device_train_batch_size": 1}  # fmt: skip
    config = load_config(overrides=overrides)
    drawn = blueprint(Qwen2Config(**model), config, torch.float32)
    load = load_of(config, has_images=False)
    guess = activation_bytes(drawn, config, load, "cpu") + loss_bytes(drawn, load.scored, "cpu")
    real = 1e6 * 1.048576 * growth_in_child(UPDATE.format(overrides=overrides, model=model))
    assert real / 1.5 < guess < real * 1.5, guess / real


# --------------------------------------------------------------------------- what a pass is, and what fits


def test_a_pass_is_what_packing_makes_of_it():
    P, C, G = 100, 10, 8  # a group is 180 tokens
    common = {"max_prompt_length": P, "max_completion_length": C, "num_generations": G,
              "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}  # fmt: skip
    load = load_of(settings(**common), has_images=True)
    assert (load.tokens, load.in_pass, load.passes, load.scored) == (720, 4, 2, 320)
    assert load.key_rows == 4 * 100 + 32 * 110 and load.image == 20 and load.prompts == 8
    assert load.images_in_pass == 720 // 108, "more prompts fit when completions are short"
    small = load_of(settings(**common, token_budget=130), has_images=False)
    assert (small.tokens, small.in_pass, small.scored, small.image) == (130, 1, 30, 0)
    least = load_of(settings(**common, token_budget=50), has_images=False)
    assert least.tokens == 110, "a prompt with one completion goes alone, whatever the budget"
    most = load_of(settings(**common, token_budget=10**6), has_images=False)
    assert (most.tokens, most.passes) == (8 * 180, 1), "no more than the step has"
    supervised = load_of(load_config("tiny-spatial-sft", kind=SFTConfig), has_images=True)
    assert supervised.group == 1 and supervised.tokens == 32 * (1024 + 32)


def changed(**overrides):
    common = {"max_completion_length": 700, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2,
              "max_pixels": 401408, "eval_data": "none"}  # fmt: skip
    return load_config(overrides=common | overrides)


@functools.cache
def drawn_2b(freeze: tuple[str, ...] = (), use_peft: bool = False) -> Policy:
    config = settings(freeze=list(freeze), use_peft=use_peft)
    return blueprint(model_2b(), config, torch.bfloat16)


def memory(config, ranks=4, gigabytes=80):
    drawn = drawn_2b(tuple(config.freeze), config.use_peft)
    return memory_of(drawn, config, ranks, "cuda", int(gigabytes * 1e9))


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
    assert memory(changed(**vllm)).rollout == 40e9 and memory(changed(**vllm)).joined == 0
    awake = memory(changed(**vllm, vllm_enable_sleep_mode=False))
    assert awake.standing - memory(changed(**vllm)).standing == 40e9
    frozen_head = memory(changed(beta=0.04, freeze="embeddings"))
    assert base.loss - frozen_head.loss == 151936 * 1536 * (4 + 2), "fp32, and its copy in bf16"
    assert base.loss < 2.4e9, "of which one chunk of logits is at most 2^30 bytes"
    many = changed(beta=0.04, gradient_accumulation_steps=64)
    assert memory(many).prefill == 8 * base.prefill, (
        "16 prompts of 1,024 tokens are read at once, not 2"
    )
    assert memory(changed(), ranks=8).optimizer * 2 == memory(changed(), ranks=4).optimizer


@pytest.mark.parametrize("gigabytes", [16, 20, 24, 32])
@pytest.mark.parametrize("beta", [0, 0.04])
def test_advice_fits(gigabytes, beta):
    """Whatever it says, with it the estimate says yes; and a larger token budget would not do."""
    config = changed(beta=beta, freeze="vision")
    device = Device("cuda", int(gigabytes * 1e9), "a GPU")
    assert memory(config, gigabytes=gigabytes).peak > device.bytes
    words = advice(drawn_2b(("vision",)), config, device, ranks=4).split()
    ranks = int(words[1]) if words[2:3] == ["ranks"] else 4
    flags = (
        [word for word in words if word not in ("try", "ranks", "with", words[1])]
        if ranks != 4
        else words[1:]
    )
    heeded = {
        name.removeprefix("--"): value for name, value in zip(flags[::2], flags[1::2], strict=True)
    }
    fixed = dataclasses.replace(config, **{
        key: int(value) if value.isdecimal() else value == "true" for key, value in heeded.items()
    })  # fmt: skip
    assert memory(fixed, ranks, gigabytes).peak <= device.bytes
    if list(heeded) == ["token_budget"]:
        larger = dataclasses.replace(config, token_budget=fixed.token_budget * 11 // 10)
        assert memory(larger, gigabytes=gigabytes).peak > device.bytes


# ----------------------------------------------------------------------------------------- --dry-run


@pytest.fixture
def folder_2b(tmp_path):
    (tmp_path / "2b").mkdir()
    model_2b().save_pretrained(tmp_path / "2b")  # config.json alone
    return str(tmp_path / "2b")


def outlook(capsys, *flags: str) -> tuple[dict, list[str]]:
    assert main(["train", "--dry-run", *flags]) == 0
    out = capsys.readouterr().out
    return yaml.safe_load(out), [line for line in out.splitlines() if line.startswith("#")]


def test_a_dry_run_prints_settings_and_an_estimate(capsys, folder_2b):
    flags = ["--recipe", "visualthinker-2b-sat", "--model", folder_2b]
    config, lines = outlook(capsys, *flags, "--gpu_memory_gb", "h100")
    assert config["model"] == folder_2b and len(lines) < 40
    text = "\n".join(lines)
    for expected in (
        "4 rank(s) on H100 of 80 GB, in bfloat16", "together                         2,209.0 M 2,209.0 M",
        "fits: yes", "8 questions a step with 8 answers each: up to 52,992 tokens", "rows of array/SAT: not known",
        "would stop here: --model: cannot read the tokenizer",
    ):  # fmt: skip
        assert expected in text
    _, lines = outlook(capsys, *flags, "--gpu_memory_gb", "10")
    assert any(line.startswith("# fits: no, ") for line in lines)
    peak = float(next(line for line in lines if line.startswith("# peak")).split()[-2])
    _, lines = outlook(capsys, *flags, "--gpu_memory_gb", str(peak * 1.05), "--num_processes", "4")
    assert any(line.startswith("# fits: tight, ") for line in lines)


def test_ranks_are_the_launchers(capsys, folder_2b, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "16")
    _, lines = outlook(
        capsys, "--model", folder_2b, "--gpu_memory_gb", "80", "--num_processes", "2"
    )
    assert "each of 16 rank(s)" in lines[1]


def test_a_model_out_of_reach_leaves_the_rest(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config, lines = outlook(capsys, "--model", "nobody/no-such-model", "--warmup_steps", "500")
    text = "\n".join(lines)
    assert (
        config["model"] == "nobody/no-such-model"
        and text.count("nobody/no-such-model is no local path") == 1
    )
    assert (
        "No estimate of the memory: " in text
        and "an epoch of at most 2,048 rows is 128 steps" in text
    )
    assert "warning: --warmup_steps 500" in text


def test_the_gpu_that_there_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60_000, 80_000))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    assert find_device(load_config()) == Device("cuda", 60_000, "a card, 75% of it free")
    assert find_device(load_config(overrides={"device": "cpu"})).kind == "cpu"
    assert find_device(load_config(), "A100-40") == Device("cuda", 40 * 10**9, "A100-40 of 40 GB")
    assert main(["train", "--gpu_memory_gb", "80"]) == 2, "it says nothing without --dry-run"


@pytest.mark.parametrize("size", ["much", "-1", "nan", "inf", "0", "H1000"])
def test_a_gpu_that_there_is_not(size):
    with pytest.raises(UserError, match=f"--gpu_memory_gb {size}: must be a number or one of L4"):
        find_device(load_config(), size)


def test_rows_are_counted_where_that_is_cheap(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"question": ["a", "b", "c"]}), tmp_path / "train.parquet")
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n')
    (tmp_path / "rows.json").write_text("[]")
    (tmp_path / "bad.parquet").write_text("no")

    def count(name, **more):
        return count_rows(load_config(overrides={"data": tmp_path / name} | more))

    assert (count("train.parquet"), count("rows.jsonl")) == (3, 2)
    assert count("train.parquet", first_n=2) == 2 and count("train.parquet", first_rows=1) == 1
    assert count("rows.json") is count("bad.parquet") is count("gone.parquet") is None
    assert count_rows(load_config()) == 2048
