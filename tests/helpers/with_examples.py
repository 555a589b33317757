"""Run by test_elsewhere.py: the examples of docs/examples run, and learn what they say."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=63,
        bos_token_id=63,
    )
    return Qwen2ForCausalLM(config)


class Letters:
    """A tokenizer of the 26 letters and some more."""

    def __call__(self, texts, return_tensors):
        from transformers import BatchEncoding

        ids = torch.tensor([[ord(c) % 64 for c in text] for text in texts])
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def batch_decode(self, ids):
        return ["".join("e" if i % 4 == 0 else "x" for i in row) for row in ids.tolist()]


def test_the_plain_loop_learns(model):
    rewards = load("torch_loop").train(model, Letters(), "Once", steps=40, lr=1e-2)
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 4


def test_the_sft_example_steps_as_hugging_faces_trainer_does(model, tmp_path):
    """Unequal rows, two of them accumulated: `num_items_in_batch` counts both."""
    import copy

    from transformers import Trainer, TrainingArguments

    example, other = load("transformers_sft"), copy.deepcopy(model)
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "prompt": 2},
        {"input_ids": [9, 8, 7], "prompt": 1},
        {"input_ids": [3, 4, 5, 6], "prompt": 3},
    ]
    settings = dict(
        max_steps=3,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        use_cpu=True,
        save_strategy="no",
        seed=0,
    )
    example.fine_tune(model, rows, str(tmp_path / "a"), **settings)
    arguments = TrainingArguments(output_dir=str(tmp_path / "b"), report_to=[], remove_unused_columns=False, **settings)
    Trainer(other, arguments, data_collator=example.collate, train_dataset=rows).train()
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4), name
