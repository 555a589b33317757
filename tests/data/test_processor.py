"""Prompts as tensors, against Hugging Face's own processor and positions."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from make_files import encoded, picture
from PIL import Image

from vtfast.data import prompt as prompt_module
from vtfast.data.images import Images, image_sizes
from vtfast.data.processor import PLACEHOLDER, Processor
from vtfast.data.prompt import mrope_positions
from vtfast.model.tiny_model import build_tiny_model
from vtfast.utils.errors import UserError

SIZES = [(84, 84), (300, 100), (64, 200)]  # width, height


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("model") / "tiny", weights="random")


@pytest.fixture(scope="module")
def processor(folder):
    return Processor.from_pretrained(folder)


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the model folder to break."""
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def prompt_of(processor, images):
    text = "".join(f"Picture {n}: {PLACEHOLDER}" for n in range(images)) + "How many?\n<think>"
    return processor.encode(text, [picture(*SIZES[n], seed=n) for n in range(images)])


# ---------------------------------------------------------------------------------- a prompt


@pytest.mark.parametrize("images", [0, 1, 3])
def test_positions_are_the_models_own(folder, processor, images):
    from transformers import Qwen2VLForConditionalGeneration

    model = Qwen2VLForConditionalGeneration.from_pretrained(folder)
    prompt = prompt_of(processor, images)
    expected, delta = model.model.get_rope_index(prompt.ids[None], prompt.image_mask[None].int(), prompt.grid)
    assert prompt.positions.dtype == torch.int64
    assert torch.equal(prompt.positions, expected[:, 0])
    assert prompt.rope_delta == delta.item()


def test_positions_by_hand():
    """Two words, an image of 2 x 3 merged tokens, a word."""
    mask = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1, 0]).bool()
    assert mrope_positions(mask, torch.tensor([[1, 4, 6]])).tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]


def test_every_image_becomes_its_number_of_tokens(processor):
    prompt = prompt_of(processor, 3)
    assert prompt.grid.tolist() == [[1, 6, 6], [1, 8, 22], [1, 14, 4]]
    assert prompt.grid.dtype == torch.int64
    assert prompt.pixels.shape == (36 + 176 + 56, 1176)
    assert prompt.pixels.dtype == torch.float32
    assert int(prompt.image_mask.sum()) == (36 + 176 + 56) // 4
    text = processor.decode(prompt.ids, keep_special=True)
    for tokens in (9, 44, 14):
        assert text.count("<|vision_start|>" + "<|image_pad|>" * tokens + "<|vision_end|>") == 1
    assert processor.decode(prompt.ids) == "Picture 0: Picture 1: Picture 2: How many?\n<think>"


def test_ids_and_pixels_are_hugging_faces_own(folder, processor):
    """Their processor class needs torchvision for its video half, so only its two steps are run:
    expand the placeholders in the text, resize and cut the image."""
    prompt = prompt_of(processor, 3)
    images = [picture(*SIZES[n], seed=n) for n in range(3)]
    theirs = processor.image_processor(images=images, return_tensors="pt")
    assert torch.equal(prompt.grid, theirs["image_grid_thw"])
    assert torch.equal(prompt.pixels, theirs["pixel_values"])
    text = prompt.text
    for tokens in (9, 44, 14):
        text = text.replace("<|image_pad|>", "<|hole|>" * tokens, 1)
    text = text.replace("<|hole|>", "<|image_pad|>")
    expected = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert prompt.ids.tolist() == expected


@pytest.mark.parametrize("images", [0, 1, 3])
def test_the_length_is_known_without_pixels(processor, images):
    prompt = prompt_of(processor, images)
    assert processor.prompt_length(prompt.text, SIZES[:images]) == len(prompt.ids)


def test_sizes_of_encoded_images():
    sources = [encoded(picture(84, 40)), picture(30, 50)]
    assert image_sizes(Images(sources)) == [(84, 40), (30, 50)]


def test_a_text_only_prompt(processor):
    prompt = processor.encode("How many?", [])
    assert prompt.pixels is None
    assert prompt.grid is None
    assert not prompt.image_mask.any()
    assert prompt.positions.tolist() == [list(range(len(prompt.ids)))] * 3
    assert prompt.rope_delta == 0


def test_the_key_is_the_content(processor):
    def key(text="How many?", image=None):
        return processor.encode(PLACEHOLDER + text, [image or picture(56, 84)]).key

    keys = [key(), key("How much?"), key(image=picture(56, 84, seed=1)), key(image=picture(84, 56))]
    assert len(set(keys)) == 4
    grey = [Image.new("L", size, 9) for size in ((56, 84), (84, 56))]  # same ids, same pixels
    assert key(image=grey[0]) != key(image=grey[1])
    assert key() == keys[0]
    assert all(0 <= k < 2**63 for k in keys)
    assert processor.encode("How many?", []).key not in keys
    # The same in every process: resuming a run must not change what is sampled.
    assert processor.encode("How many?", []).key == processor.encode("How many?", []).key
    assert prompt_module._key(torch.tensor([1, 2, 3]), None, None) == 6520558355739401531


def test_images_are_taken_in_any_form(processor, tmp_path):
    data = encoded(picture(), "PNG")
    (tmp_path / "a.png").write_bytes(data)
    forms = [[picture()], Images([data]), [data], [tmp_path / "a.png"], [str(tmp_path / "a.png")]]
    assert len({processor.encode(PLACEHOLDER, form).key for form in forms}) == 1


# ------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("text", "images"),
    [
        ("How many?", 1),
        (PLACEHOLDER, 0),
        (PLACEHOLDER * 2, 1),
        (PLACEHOLDER + "<|image_pad|>", 1),
        ("<|image_pad|>", 1),
    ],
)
def test_placeholders_must_match_the_images(processor, text, images):
    with pytest.raises(UserError, match=f"for {images} images"):
        processor.encode(text, [picture()] * images)


def test_unusable_images_are_named(processor, tmp_path):
    torn = tmp_path / "torn.png"
    torn.write_bytes(encoded(picture(200, 200), "PNG")[:-2000])
    for bad, told in [
        (picture(1, 1), "image of 1 x 1 pixels"),
        (picture(1, 50), "image of 1 x 50 pixels"),
        (picture(402, 2), "image of 402 x 2 pixels: aspect ratio above 200"),
        (str(torn), f"({torn}): corrupt image"),
        (tmp_path / "none.png", "no such file"),
        (b"nonsense", "not an image"),
    ]:
        with pytest.raises(UserError) as error:
            processor.encode(PLACEHOLDER * 2, [picture(), bad])
        assert str(error.value).startswith("image 2 of 2")
        assert told in str(error.value)


def test_not_a_checkpoint(copy, tmp_path):
    with pytest.raises(UserError, match=r"no model folder .*nowhere"):
        Processor.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="bare"):
        Processor.from_pretrained(tmp_path / "bare")
    (copy / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        Processor.from_pretrained(copy)


def test_a_hub_id_without_connection(tmp_path):
    code = "from vtfast.data import Processor; Processor.from_pretrained('Qwen/Qwen2-VL-2B')"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "no_proxy": "*"},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert "UserError: Qwen/Qwen2-VL-2B is no local path" in run.stderr.splitlines()[-1]


# -------------------------------------------------------------------------------- checkpoint


def test_limits_are_used_and_saved(folder, processor, tmp_path):
    image = picture(500, 400)
    assert processor.encode(PLACEHOLDER, [image]).grid.tolist() == [[1, 28, 36]]
    small = Processor.from_pretrained(folder, max_pixels=100 * 28 * 28)
    assert small.encode(PLACEHOLDER, [image]).grid.tolist() == [[1, 16, 22]]
    large = Processor.from_pretrained(folder, min_pixels=400 * 28 * 28)
    assert large.encode(PLACEHOLDER, [image]).grid.tolist() == [[1, 36, 46]]
    small.save_pretrained(tmp_path)
    again = Processor.from_pretrained(tmp_path)
    assert again.encode(PLACEHOLDER, [image]).key == small.encode(PLACEHOLDER, [image]).key
    with pytest.raises(UserError, match="min_pixels 3136 and max_pixels 100"):
        Processor.from_pretrained(folder, max_pixels=100)


def test_a_saved_processor_is_what_transformers_reads(processor, tmp_path):
    from transformers import AutoTokenizer

    processor.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("How many?")["input_ids"] == processor.encode("How many?", []).ids.tolist()
    assert tokenizer.chat_template == processor.tokenizer.chat_template
    config = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert config["image_processor_type"].startswith("Qwen2VLImageProcessor")


@pytest.mark.parametrize(("eos", "ids"), [(7, [7]), ([7, 5], [7, 5]), (None, None)])
def test_end_tokens_are_the_checkpoints(copy, eos, ids):
    settings = {"temperature": 0.01, "top_k": 1, "repetition_penalty": 1.05, "do_sample": True}
    (copy / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": eos}))
    processor = Processor.from_pretrained(copy)
    assert processor.eos_ids == (ids or [processor.tokenizer.eos_token_id])
    (copy / "generation_config.json").unlink()
    assert Processor.from_pretrained(copy).eos_ids == [processor.tokenizer.eos_token_id]
    (copy / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json"):
        Processor.from_pretrained(copy)


def test_decoding_leaves_special_tokens_out_unless_asked(processor):
    ids = processor.tokenizer("a</think><answer>b</answer><|im_end|>")["input_ids"]
    assert processor.decode(ids) == "a</think><answer>b</answer>"
    assert processor.decode(torch.tensor(ids)) == "a</think><answer>b</answer>"
    assert processor.decode(ids, keep_special=True) == "a</think><answer>b</answer><|im_end|>"
