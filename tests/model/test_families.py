"""Every family that `load_model` knows, through packing, rollout, loss and a short run, against Hugging Face."""

import json
import shutil

import pytest
import torch
import transformers
from hugging_face import inputs, logprobs
from make_files import picture, write_jsonl
from safetensors.torch import load_file

from vtfast.cli.main import main
from vtfast.config import field_help
from vtfast.cost.flops import forward_flops
from vtfast.data.processor import Processor
from vtfast.data.prompt import Prompt
from vtfast.data.prompt_templates import IMAGE
from vtfast.model.loading import FAMILIES, load_model
from vtfast.model.policy import Policy, layer_types
from vtfast.rollout import RolloutEngine, Sampling
from vtfast.scoring import completion_logprobs
from vtfast.utils.errors import UserError

V, END = 400, 386
TEXT = dict(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=V,
    max_position_embeddings=2048,
    bos_token_id=END,
    eos_token_id=END,
)
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
MARKS = dict(image_token_id=398, video_token_id=399, vision_start_token_id=395, vision_end_token_id=396)


VISION = dict(
    depth=3,
    hidden_size=32,
    num_heads=2,
    intermediate_size=40,
    out_hidden_size=48,
    window_size=56,
    fullatt_block_indexes=[1],
)
CONFIGURATIONS = {
    "qwen2_5_vl": transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": MROPE}, vision_config=VISION, tie_word_embeddings=True, **MARKS
    ),
    "qwen2": transformers.Qwen2Config(**TEXT, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**TEXT, head_dim=16, tie_word_embeddings=False),
}


def with_random_weights(module):
    """Biases and norms too."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        spread = 0.3 if parameter.dim() == 1 else 0.15
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=spread)
    return module


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def folder(request, random_path, tmp_path_factory):
    """A checkpoint with random weights and the tiny model's tokenizer."""
    if request.param == "qwen2_vl":
        return random_path
    folder = tmp_path_factory.mktemp(request.param)
    module = with_random_weights(FAMILIES[request.param](CONFIGURATIONS[request.param]))
    module.generation_config.eos_token_id = [END]
    module.save_pretrained(folder)
    names = ["tokenizer.json", "tokenizer_config.json"]
    for name in names + ["preprocessor_config.json"] * hasattr(module.model, "visual"):
        shutil.copy(random_path / name, folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def questions(folder, model):
    processor = Processor.from_pretrained(folder)
    questions = [processor.encode("User: how many?\nAssistant:", []), processor.encode("Left or right", [])]
    if model.vision is None:
        return questions
    wide, small = picture(196, 84, seed=1), picture(56, 112, seed=2)
    return [*questions, processor.encode(f"{IMAGE}and{IMAGE}?", [wide, small]), processor.encode(f"{IMAGE}!", [small])]


COMPLETIONS = [[[5, 6, 7], [8]], [[9, 10]], [[11, 12, 13, 14], [15, 16]], [[1, 2], [3]]]


def test_every_family_is_tested_and_in_the_help():
    """Qwen2-VL is the other tests' model."""
    assert {"qwen2_vl", *CONFIGURATIONS} == set(FAMILIES)
    told = bare(field_help()["model"])
    assert all(bare(family) in told for family in FAMILIES)


def bare(text):
    return "".join(filter(str.isalnum, text)).lower()


def flat(groups):
    return torch.cat([logp for group in groups for logp in group])


def oracle(model, questions):
    pairs = zip(questions, COMPLETIONS, strict=False)
    return torch.cat([logprobs(model, prompt, tokens) for prompt, group in pairs for tokens in group])


@pytest.mark.parametrize("freeze", [[], ["language"]])
def test_scores_and_gradients_equal_hugging_faces(folder, questions, freeze):
    model, judge = load_model(folder, freeze=freeze), load_model(folder, freeze=freeze)
    if freeze and model.vision is None:
        model.module.lm_head.weight.requires_grad_(), judge.module.lm_head.weight.requires_grad_()
    ours, theirs = (
        flat(completion_logprobs(model, questions, COMPLETIONS[: len(questions)])),
        oracle(judge, questions),
    )
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    weight = torch.randn(len(ours), generator=torch.Generator().manual_seed(0))
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    expected = {n: p.grad for n, p in judge.module.named_parameters() if p.requires_grad}
    for name, parameter in model.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if expected[name] is None:  # parts that no prompt of these reaches
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        error = (parameter.grad - expected[name]).norm() / expected[name].norm().clamp(min=1e-5)
        assert error < 1e-4, (name, float(error))


@pytest.mark.parametrize("freeze", [["vision"], ["vision", "merger"]])
def test_remembered_images_are_the_same(folder, questions, freeze):
    model = load_model(folder)
    if model.vision is None:
        with pytest.raises(UserError, match=r"--freeze vision: must be among .*: language, embeddings"):
            load_model(folder, freeze=freeze)
        return
    frozen, calls = load_model(folder, freeze=freeze), []
    frozen.vision.module.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), frozen.cache_image_features():
        first = flat(completion_logprobs(frozen, questions, COMPLETIONS))
        some = flat(completion_logprobs(frozen, questions[::-1], COMPLETIONS[::-1]))
    expected = oracle(model, questions).float()
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)
    lengths = [sum(map(len, group)) for group in COMPLETIONS]
    backwards = torch.cat(expected.split(lengths)[::-1])
    torch.testing.assert_close(some, backwards, rtol=1e-5, atol=1e-5)
    assert len(calls) == 1


def test_rollout_equals_hugging_faces_generate(model, questions):
    engine = RolloutEngine(model)
    greedy = engine.generate(questions, 1, Sampling(max_new_tokens=10, greedy=True))
    config = transformers.GenerationConfig(do_sample=False, max_new_tokens=10, eos_token_id=[END], pad_token_id=0)
    for prompt, (row,) in zip(questions, greedy, strict=True):
        theirs = model.module.generate(**inputs(prompt), generation_config=config)
        assert row.tokens == theirs[0, len(prompt.ids) :].tolist()
    sampled = engine.generate(questions, 3, Sampling(max_new_tokens=10), seed=1)
    for groups in (greedy, sampled):
        with torch.no_grad():
            scored = completion_logprobs(model, questions, [[c.tokens for c in group] for group in groups])
        for group, logps in zip(groups, scored, strict=True):
            for row, logp in zip(group, logps, strict=True):
                assert row.logprobs == pytest.approx(logp.tolist(), abs=1e-5)


def test_flops_count_every_matmul(folder, model):
    """Against the sizes of the weights, where every token passes every one."""
    linear = [m.weight.numel() for m in model.language_model.modules() if isinstance(m, torch.nn.Linear)]
    flops = forward_flops(model.module.config, 7, [3, 5], [] if model.vision is None else [64])
    assert flops.decoder == 2 * 15 * sum(linear) and flops.head == 2 * 8 * V * 48
    if model.vision is not None:
        blocks = sum(m.weight.numel() for m in model.vision.module.blocks.modules() if isinstance(m, torch.nn.Linear))
        merger = sum(m.weight.numel() for m in model.vision.module.merger.modules() if isinstance(m, torch.nn.Linear))
        patch = model.vision.module.patch_embed.proj.weight.numel()
        attention = 4 * 64 * 32 * (64 + 2 * 16)  # one whole block, two of windows of 4 x 4 patches
        assert flops.vision == 2 * 64 * (blocks + patch + merger / 4) + attention


def test_a_short_run(folder, model, tmp_path, monkeypatch):
    """From rows to a checkpoint that loads again, on questions without images."""
    rows = [{"problem": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(6)]
    (tmp_path / "letters.py").write_text("def count(completion, sample):\n    return len(completion)")
    monkeypatch.syspath_prepend(tmp_path)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--num_generations", "2", "--device", "cpu"]
    flags += ["--max_completion_length", "5", "--template", "r1-zero-text", "--beta", "0.04", "--cpu_threads", "1"]
    flags += [
        "--eval_data",
        str(data),
        "--eval_samples",
        "2",
        "--learning_rate",
        "0.01",
        "--reward_funcs",
        "letters:count",
    ]
    run = tmp_path / "run"
    assert main(["train", "--model", str(folder), "--data", str(data), *flags, "--output_dir", str(run)]) == 0
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2 and all(step["sampler_drift"] < 1e-5 for step in steps)
    again = load_model(run / "checkpoints" / "step-2")
    changed = [n for n, p in again.module.named_parameters() if not torch.equal(p, model.module.get_parameter(n))]
    assert any("layers" in name for name in changed) and again.eos_ids == (END,)
    Processor.from_pretrained(run / "checkpoints" / "step-2")


MISMATCH = 1e-5
"""Largest difference between the sampler's and the trainer's log-prob of a token: nats, in float32 on the CPU."""


@pytest.fixture(scope="module")
def long_run(folder, tmp_path_factory):
    """A run of 20 steps that moves the weights, on images if the family reads them: (its metrics, its checkpoint)."""
    home = tmp_path_factory.mktemp("long_run")
    has_vision = load_model(folder).vision is not None
    rows = [{"problem": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(12)]
    for i, row in enumerate(rows if has_vision else []):
        picture(56 + 28 * (i % 2), 56, seed=i).save(home / f"{i}.png")
        row["image"] = f"{i}.png"
    data = write_jsonl(home / "rows.jsonl", rows)
    (home / "lengths.py").write_text("def count(completion, sample):\n    return len(completion)")
    settings = {"max_steps": 20, "per_device_train_batch_size": 2, "num_generations": 4, "max_completion_length": 8}
    settings |= {"learning_rate": 0.003, "template": "r1-zero" if has_vision else "r1-zero-text"}
    settings |= {"device": "cpu", "cpu_threads": 1, "eval_data": "none", "save_steps": 0, "report_to": "none"}
    settings |= {"reward_funcs": "lengths:count", "data": data, "model": folder, "output_dir": home / "run"}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(home)
        assert main(["train", *(text for name, value in settings.items() for text in (f"--{name}", str(value)))]) == 0
    steps = [json.loads(line) for line in (home / "run" / "metrics.jsonl").read_text().splitlines()]
    return steps, home / "run" / "checkpoints" / "step-20"


@pytest.mark.parametrize("folder", FAMILIES, indirect=True)
def test_sampler_and_trainer_agree_over_20_steps(long_run):
    steps, _ = long_run
    assert [step["step"] for step in steps] == list(range(1, 21))
    assert max(step["sampler_drift_max"] for step in steps) < MISMATCH
    assert min(step["grad_norm"] for step in steps) > 0


@pytest.mark.parametrize("folder", FAMILIES, indirect=True)
def test_a_checkpoint_has_the_keys_of_the_original(folder, long_run):
    """And its shapes and dtypes: code that loads the original loads a checkpoint."""
    original, trained = (load_file(path / "model.safetensors") for path in (folder, long_run[1]))
    assert {key: (x.shape, x.dtype) for key, x in trained.items()} == {
        key: (x.shape, x.dtype) for key, x in original.items()
    }
    assert any(not trained[key].equal(x) for key, x in original.items())


def test_images_for_a_text_model_are_refused(folder, model):
    if model.vision is not None:
        return
    processor = Processor.from_pretrained(folder)
    with pytest.raises(UserError, match="images for a text model"):
        processor.encode(f"{IMAGE}?", [picture(56, 56)])
    with pytest.raises(UserError, match="images for a text model"):
        processor.prompt_length(f"{IMAGE}?", [(56, 56)])


def test_other_families_are_named(tmp_path):
    transformers.GPT2Config().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=f"is a gpt2 model; those of {', '.join(FAMILIES)} can be trained"):
        load_model(tmp_path)


def test_layers_of_one_kind_need_no_names():
    """Llama's and Mistral's configurations, which have no list of them."""
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))
    policy = Policy(with_random_weights(llama).eval(), ())
    assert layer_types(llama.config) == {"full_attention"}
    places = torch.arange(5)
    prompt = Prompt(ids=places + 20, positions=places.expand(3, -1))
    ours = flat(completion_logprobs(policy, [prompt], [COMPLETIONS[0]]))
    torch.testing.assert_close(ours.double(), oracle(policy, [prompt]), rtol=1e-5, atol=1e-5)
    config = transformers.MistralConfig(**TEXT, sliding_window=8)
    windowed = Policy(transformers.MistralForCausalLM(config), ())
    assert layer_types(config) == {"sliding_attention"}
    with pytest.raises(UserError, match="does not support sliding-window attention"):
        RolloutEngine(windowed)
