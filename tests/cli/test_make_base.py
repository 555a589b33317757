"""The tiny base model: its folder as Hugging Face reads it, the shipped weights, the recipe."""

import io
import json
import random

import pytest
import torch
from PIL import Image

from vtfast.cli.demo_model import recipe, training
from vtfast.data.prompt_templates import IMAGE
from vtfast.data.synthetic import Scene, Thing, encode_jpeg, render, sample_questions
from vtfast.model import tiny_model
from vtfast.model.tiny_model import ASSET, SPECIAL_IDS, build_tiny_model, prompt_text

# isort: split
# Behind vtfast, which makes torchvision importable beside a CPU-only torch.
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    GenerationConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
)

END = SPECIAL_IDS["<|endoftext|>"]
IMAGE_PAD = SPECIAL_IDS["<|image_pad|>"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Operations this small lose more to waiting for threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "model", weights="random", seed=7)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def stock_inputs(path, questions, prompts):
    """What stock Hugging Face code is given, one question at a time."""
    processor = Qwen2VLImageProcessor.from_pretrained(path)
    for question, prompt in zip(questions, prompts, strict=True):
        image = Image.open(io.BytesIO(encode_jpeg(render(question.scene))))
        ids = torch.tensor([prompt])
        seen = processor([image], return_tensors="pt")
        yield {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE_PAD).int(), **seen}


# ------------------------------------------------------------------------------------------ folder


def test_architecture_is_qwen2_vl(folder):
    config = AutoConfig.from_pretrained(folder)
    model, info = Qwen2VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert config.architectures == ["Qwen2VLForConditionalGeneration"]
    assert not any(info.values()), info
    assert sum(p.numel() for p in model.parameters()) == 521_280
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert config.text_config.rope_parameters["mrope_section"] == [4, 4, 4]
    assert config.text_config.rope_parameters["rope_theta"] == 10.0
    for token, key in (
        ("<|image_pad|>", "image_token_id"),
        ("<|video_pad|>", "video_token_id"),
        ("<|vision_start|>", "vision_start_token_id"),
        ("<|vision_end|>", "vision_end_token_id"),
    ):
        assert getattr(config, key) == SPECIAL_IDS[token]


def test_generation_config_ends_at_both_tokens_and_penalises_nothing(folder):
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == [SPECIAL_IDS["<|im_end|>"], END]
    assert generation.pad_token_id == END
    assert generation.repetition_penalty in (None, 1.0)


def test_image_processor_is_read_with_its_limits(folder):
    processor = AutoImageProcessor.from_pretrained(folder)
    assert "Qwen2VLImageProcessor" in type(processor).__name__
    assert processor.size["shortest_edge"] == 3136
    assert processor.size["longest_edge"] == 12_845_056
    grid = processor([Image.new("RGB", (84, 84))], return_tensors="pt")["image_grid_thw"]
    assert grid.tolist() == [[1, 6, 6]]


def test_tokenizer_has_qwens_special_tokens_last(tokenizer):
    assert len(tokenizer) == 400
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == END
    assert list(SPECIAL_IDS.values()) == list(range(386, 400))
    for token, number in SPECIAL_IDS.items():
        assert tokenizer.convert_tokens_to_ids(token) == number
        assert tokenizer(f"a{token}b").input_ids.count(number) == 1
    assert tokenizer.decode([END, IMAGE_PAD], skip_special_tokens=True) == ""


@pytest.mark.parametrize(
    "text",
    [
        "red is left, blue is right</think><answer>left</answer>",
        "  two  spaces\n\n\tand a tab ",
        "naïve café — “quotes” … 你好 🙂\u200d e\u0301",
        "".join(map(chr, range(1, 256))),
        " .,!?'s n't do n't",
    ],
)
def test_tokenizer_returns_any_text_as_it_was(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_both_chat_templates(tokenizer):
    content = [{"type": "image"}, {"type": "text", "text": "How many?"}]
    flat = tokenizer.apply_chat_template(content, tokenize=False)
    assert flat == IMAGE + "How many?"
    message = [{"role": "user", "content": content}]
    asked = tokenizer.apply_chat_template(message, chat_template="instruct", tokenize=False, add_generation_prompt=True)
    assert asked == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{IMAGE}How many?<|im_end|>\n<|im_start|>assistant\n"
    )
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(own, chat_template="instruct", tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    )


def test_random_weights_follow_the_seed(folder, tmp_path):
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    same = build_tiny_model(tmp_path / "same", weights="random", seed=7)
    other = build_tiny_model(tmp_path / "other", weights="random", seed=8)
    assert torch.equal(state, torch.random.get_rng_state())  # the caller's randomness is its own
    weights = [(p / "model.safetensors").read_bytes() for p in (folder, same, other)]
    assert weights[0] == weights[1] != weights[2]


def test_a_folder_with_files_is_not_written_over(folder):
    with pytest.raises(ValueError, match="not an empty folder"):
        build_tiny_model(folder, weights="random")


# ------------------------------------------------------------------------------------------ asset


def test_asset_is_copied_whole(tmp_path):
    path = build_tiny_model(tmp_path / "base")
    assert {p.name for p in path.iterdir()} == {p.name for p in ASSET.iterdir()}
    assert (path / "model.safetensors").stat().st_size <= 4_000_000
    recipe = json.loads((path / "recipe.json").read_text())
    assert tiny_model.sha256(path / "model.safetensors") == recipe["sha256"]


def test_asset_has_the_files_that_the_code_writes(folder):
    for name in ("config.json", "generation_config.json", "preprocessor_config.json"):
        shipped, written = (json.loads((p / name).read_text()) for p in (ASSET, folder))
        for content in (shipped, written):
            content.pop("transformers_version", None)
        assert shipped == written, name
    shipped, written = (AutoTokenizer.from_pretrained(p) for p in (ASSET, folder))
    assert shipped.get_vocab() == written.get_vocab()
    assert shipped.chat_template == written.chat_template


def test_asset_answers_in_stock_code_as_in_ours_and_as_its_recipe_says():
    model = Qwen2VLForConditionalGeneration.from_pretrained(ASSET)
    tokenizer = AutoTokenizer.from_pretrained(ASSET)
    questions = sample_questions(200, split="val", seed=5)
    rng = random.Random(5)
    prompts = [recipe.prompt_ids(tokenizer.backend_tokenizer, prompt_text(q, rng)) for q in questions]
    ours = training.complete(model, [q.scene for q in questions], prompts, eos=END)
    stock = []
    for inputs in stock_inputs(ASSET, questions[:24], prompts[:24]):
        output = model.generate(**inputs, do_sample=False, max_new_tokens=32)
        completion = output[0, inputs["input_ids"].shape[1] :].tolist()
        stock.append(completion[: completion.index(END)] if END in completion else completion)
    assert stock == ours[:24]
    found = training.scores(questions, tokenizer.batch_decode(ours))
    assert 0.5 < found["accuracy"]["all"] < 0.7
    assert found["trace"]["all"] > 0.9
    measured = json.loads((ASSET / "recipe.json").read_text())["measured"]
    assert 0.55 <= measured["greedy"]["accuracy"]["all"] <= 0.62
    assert 0.42 <= measured["sampled"]["format"]["all"] <= 0.50
    assert min(measured["greedy"]["trace"].values()) >= 0.9


# ------------------------------------------------------------------------------------------ recipe


def test_training_sees_what_stock_code_sees(folder):
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder)
    tokenizer = tiny_model.build_tokenizer()
    questions = sample_questions(4, split="train", seed=1)
    rng = random.Random(1)
    examples = [recipe.question_example(tokenizer, q, rng) for q in questions]
    losses, tokens = [], []
    for inputs, example in zip(
        stock_inputs(folder, questions, [e.prompt + e.completion for e in examples]), examples, strict=True
    ):
        labels = inputs["input_ids"].clone()
        labels[:, : len(example.prompt)] = -100
        losses.append(model(**inputs, labels=labels).loss.item() * len(example.completion))
        tokens.append(len(example.completion))
    ours = training.completion_loss(model, examples, END).item()
    assert ours == pytest.approx(sum(losses) / sum(tokens), rel=1e-5)


def test_cell_contents_are_the_scene():
    things = (Thing("red", "circle", "small", row=0, column=2), Thing("yellow", "triangle", "large", row=2, column=1))
    (contents,) = training.cell_contents([Scene(things)]).tolist()
    assert contents[2] == [1, 1, 1, 2, 0]
    assert contents[7] == [4, 3, 2, 1, 2]
    empty = [cell for i, cell in enumerate(contents) if i not in (2, 7)]
    assert empty == [[0, 0, 0, i % 3, i // 3] for i in range(9) if i not in (2, 7)]


def test_prompts_are_those_of_the_trainer():
    question = sample_questions(1, split="train", seed=0)[0]
    one, two = question.options
    text = prompt_text(question, random.Random(0))
    starts = f"{IMAGE}User: {question.text} Choose: "
    assert text in (f"{starts}{one} or {two}\nAssistant: <think>", f"{starts}{two} or {one}\nAssistant: <think>")
    assert len({prompt_text(question, random.Random(i)) for i in range(20)}) == 2


def test_weak_examples_keep_the_trace_and_break_the_rest_as_often_as_said():
    tokenizer = tiny_model.build_tokenizer()
    rng = random.Random(0)
    questions = sample_questions(600, split="train", seed=2)
    texts = []
    for question in questions:
        example = recipe.question_example(tokenizer, question, rng, weak=True)
        assert example.completion[-1] == END and len(example.completion) <= 28
        texts.append(tokenizer.decode(example.completion[:-1], skip_special_tokens=False))
        assert texts[-1].startswith(question.trace)
    found = training.scores(questions, texts)
    assert found["trace"]["all"] == 1.0
    assert found["format"]["all"] == pytest.approx(recipe.KEEPS_FORMAT, abs=0.06)
    assert 0.2 < found["accuracy"]["all"] < 0.4
    clean = [recipe.question_example(tokenizer, q, rng).completion[:-1] for q in questions]
    found = training.scores(questions, [tokenizer.decode(c) for c in clean])
    assert {s["all"] for s in found.values()} == {1.0}


def test_three_steps_are_the_same_bit_for_bit(tmp_path):
    options = {"warmup_steps": 2, "weak_steps": 1, "questions": 0, "progress": False}
    before = torch.get_num_threads()
    one, same, other = (
        recipe.make_base(tmp_path / name, seed=seed, **options) / "model.safetensors"
        for name, seed in (("one", 0), ("same", 0), ("other", 1))
    )
    assert torch.get_num_threads() == before
    assert one.read_bytes() == same.read_bytes() != other.read_bytes()
    made = json.loads((one.parent / "recipe.json").read_text())
    assert made["sha256"] == tiny_model.sha256(one)
    assert (made["seed"], made["warmup_steps"], made["weak_steps"]) == (0, 2, 1)
    untrained = build_tiny_model(tmp_path / "random", weights="random") / "model.safetensors"
    assert one.read_bytes() != untrained.read_bytes()


def test_scores_tell_the_ways_to_fail_apart():
    question = sample_questions(1, split="val", seed=0)[0]
    trace, right, wrong = question.trace, question.options[0], question.options[1]
    good = f"{trace}</think><answer>{right}</answer>"
    cases = {
        good: (1, 1, 1),
        f"{trace}</think><answer>{wrong}</answer>": (0, 1, 1),
        f"{trace}</think><answer>{right}": (0, 0, 1),
        f"{trace} so {right}": (0, 0, 1),
        f"{good} done": (1, 0, 1),
        f"{trace}x</think><answer>{right}</answer>": (1, 1, 0),
        "": (0, 0, 0),
    }
    for text, expected in cases.items():
        found = training.scores([question], [text])
        assert tuple(found[k]["all"] for k in ("accuracy", "format", "trace")) == expected, text
