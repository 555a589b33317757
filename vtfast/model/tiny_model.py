"""The tiny Qwen2-VL that ships with vtfast, as a Hugging Face folder.

Half a million parameters in the architecture of Qwen2-VL, a byte-level BPE tokenizer of 400 ids with all of Qwen2-VL's
special tokens, its two chat templates and its image processor: code that loads Qwen/Qwen2-VL-2B loads this.
The shipped weights were made by `vtfast.cli.demo_model.recipe`.
"""

import json
import os
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vtfast.data.prompt_templates import load_template, render
from vtfast.data.row_parser import Sample
from vtfast.data.synthetic import CELL, KINDS, Question, sample_question
from vtfast.utils.files import sha256, write_json
from vtfast.utils.hub import ASSETS

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

ASSET = ASSETS / "tiny-spatial-base"

VOCABULARY = 400
SPECIAL_TOKENS = (  # Qwen2-VL's, in its order; they take the last ids, as there
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
SPECIAL_IDS = {t: VOCABULARY - len(SPECIAL_TOKENS) + i for i, t in enumerate(SPECIAL_TOKENS)}

# CLIP's, which Qwen2-VL uses.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)

_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
_ITEM = (
    "{% if item.type == 'image' or 'image' in item or 'image_url' in item %}"
    + _IMAGE
    + "{% elif item.type == 'video' or 'video' in item %}"
    + _VIDEO
    + "{% elif 'text' in item %}{{ item.text }}{% endif %}"
)
# The base model's: a flat list of content, joined; no roles, no generation prompt.
BASE_CHAT_TEMPLATE = (
    "{% if messages is string %}{{ messages }}{% else %}{% for item in messages %}" + _ITEM + "{% endfor %}{% endif %}"
)
# The Instruct model's: ChatML with a default system message.
INSTRUCT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message.role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for item in message.content %}" + _ITEM + "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tiny_model(path: str | Path, *, weights: Literal["asset", "random"] = "asset", seed: int = 0) -> Path:
    """Make the model folder at `path` (a new or empty folder) and return it.

    `weights`: "asset" copies the shipped base model, "random" draws untrained weights from `seed` (for tests).
    Raises ValueError for a folder that is not empty.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"path: {path} exists and is not an empty folder")
    if weights == "asset":
        shutil.copytree(ASSET, path, dirs_exist_ok=True)
    else:
        write_folder(path, random_model(seed))
    return path


def random_model(seed: int) -> "Qwen2VLForConditionalGeneration":
    """Untrained fp32 model in eval mode. Does not change the caller's random state."""
    import torch
    from transformers import Qwen2VLForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2VLForConditionalGeneration(model_config()).float().eval()


def model_config() -> "Qwen2VLConfig":
    """521k parameters. theta 10 fits sequences of a hundred tokens, where Qwen's 1e6 would leave most
    of M-RoPE's few frequencies constant."""
    from transformers import Qwen2VLConfig

    end = SPECIAL_IDS["<|endoftext|>"]
    return Qwen2VLConfig(
        architectures=["Qwen2VLForConditionalGeneration"],
        dtype="float32",
        tie_word_embeddings=True,
        image_token_id=SPECIAL_IDS["<|image_pad|>"],
        video_token_id=SPECIAL_IDS["<|video_pad|>"],
        vision_start_token_id=SPECIAL_IDS["<|vision_start|>"],
        vision_end_token_id=SPECIAL_IDS["<|vision_end|>"],
        text_config=dict(
            vocab_size=VOCABULARY,
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            initializer_range=0.06,
            rms_norm_eps=1e-6,
            bos_token_id=end,
            eos_token_id=end,
            tie_word_embeddings=True,
            dtype="float32",
            rope_parameters={"rope_type": "default", "rope_theta": 10.0, "mrope_section": [4, 4, 4]},
        ),
        vision_config=dict(
            depth=2,
            embed_dim=64,
            num_heads=4,
            mlp_ratio=2,
            hidden_size=96,
            patch_size=CELL // 2,
            spatial_merge_size=2,
            temporal_patch_size=2,
            initializer_range=0.06,
            dtype="float32",
        ),
    )


def write_folder(path: str | Path, model: "Qwen2VLForConditionalGeneration", *, recipe: dict | None = None) -> None:
    """Write weights, configuration, tokenizer and image processor; the folder is renamed into place when complete.

    `recipe` becomes recipe.json, with the checksum of the weights added.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_weights(part / "model.safetensors", model)
        model.config.save_pretrained(part)
        write_json(part / "generation_config.json", _GENERATION)
        write_json(part / "preprocessor_config.json", _PREPROCESSOR)
        _write_tokenizer(part)
        if recipe is not None:
            checksum = sha256(part / "model.safetensors")
            write_json(part / "recipe.json", {**recipe, "sha256": checksum})
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.rmdir()  # an empty folder: `rename` replaces none on Windows
        part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_weights(file: Path, model: "Qwen2VLForConditionalGeneration") -> None:
    """Write the fp32 weights by the names that Qwen/Qwen2-VL-2B uses (`visual.*`, `model.*`), without the tied head."""
    from safetensors.torch import save_file

    state = {
        name.removeprefix("model.").replace("language_model.", "model.", 1): tensor.float().contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, file, metadata={"format": "pt"})


_GENERATION = {
    # The sampling settings are Qwen's: near-greedy, for chat. A trainer must not inherit them.
    "bos_token_id": SPECIAL_IDS["<|endoftext|>"],
    "pad_token_id": SPECIAL_IDS["<|endoftext|>"],
    "eos_token_id": [SPECIAL_IDS["<|im_end|>"], SPECIAL_IDS["<|endoftext|>"]],
    "do_sample": True,
    "temperature": 0.01,
    "top_k": 1,
    "top_p": 0.001,
}

_PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "size": {"shortest_edge": 56 * 56, "longest_edge": 16384 * 28 * 28},  # in pixels, not sides
    "patch_size": CELL // 2,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": PIXEL_MEAN,
    "image_std": PIXEL_STD,
}


def _write_tokenizer(folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    tokenizer.chat_template = {"default": BASE_CHAT_TEMPLATE, "instruct": INSTRUCT_CHAT_TEMPLATE}
    # Both templates in tokenizer_config.json: one file, instead of one here and one in a subfolder.
    tokenizer.save_pretrained(folder, save_jinja_files=False)


def prompt_text(question: Question, rng: random.Random, *, images: int = 1) -> str:
    """The prompt of the `brief` template, options shuffled: what the trainer shows the model."""
    options = rng.sample(question.options, len(question.options))
    sample = Sample(question.text, options, question.answer, images=[""] * images)
    return render(load_template("brief"), sample)


def completion_text(trace: str, answer: str) -> str:
    return f"{trace}</think><answer>{answer}</answer>"


def build_tokenizer() -> "Tokenizer":
    """Byte-level BPE of 400 ids, learned from the questions and their answers; always the same.

    All 256 bytes are in it and nothing normalises, so any text comes back as it was. Every word of
    the questions is one id, found whole before merging (`ignore_merges`, as in Llama 3): merges
    alone would spend most of the few ids on word pieces, and prompts twice as long are far harder
    to learn. The ids that remain are ordinary merges.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    corpus = _tokenizer_corpus()
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    words = sorted({word for line in corpus for word, _ in splitter.pre_tokenize_str(line)})
    room = VOCABULARY - len(SPECIAL_TOKENS)

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = splitter
    alphabet = sorted(splitter.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=room, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(corpus, trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    while True:  # drop the last merges to make room for words; a merge may itself make a word
        pieces = list(dict.fromkeys([*alphabet, *map("".join, merges), *words]))
        if len(pieces) <= room:
            break
        merges.pop()
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    assert tokenizer.get_vocab_size() == VOCABULARY
    return tokenizer


def _tokenizer_corpus() -> list[str]:
    rng = random.Random("tokenizer")
    lines = []
    for i in range(2000):
        question = sample_question(rng, kind=KINDS[i % len(KINDS)])
        # Completions count more than prompts: they are sampled token by token, prompts are read once.
        lines.append(prompt_text(question, rng, images=0))
        lines.extend([completion_text(question.trace, question.answer)] * 3)
    return lines
