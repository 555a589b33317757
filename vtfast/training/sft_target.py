"""The target of a sample in supervised fine-tuning: its text, and its tokens with the end token.

A target is text with the slot {answer}. The text may contain special tokens; data with special tokens are refused when
they are loaded.
"""

from __future__ import annotations

from vtfast.data import Sample
from vtfast.data.processor import Processor
from vtfast.data.prompt_templates import response_prefix
from vtfast.utils.errors import UserError
from vtfast.utils.files import expand, read_text

SLOT = "{answer}"
END_OF_TURN = "<|im_end|>"


def load_target(text_or_path: str) -> str:
    """The text of `--target`: the value itself, or the content of a .txt file without its last line feed.

    Raises UserError for a file that cannot be read, and for a text without {answer}."""
    text = text_or_path
    if text.endswith(".txt"):
        text = read_text(expand(text)).removesuffix("\n")
    if SLOT not in text:
        raise UserError(f"--target {text_or_path}: has no {SLOT}; write it where the answer goes")
    return text


class Target:
    """Makes the tokens that follow a sample's prompt."""

    def __init__(self, text: str, template: str, processor: Processor) -> None:
        """`template`: text of the prompt template. If it ends with `<think>`, the target may start with it too.

        Raises UserError for a target that does not close the prompt's `<think>`."""
        self.processor = processor
        self.is_bare = "<answer>" not in text
        """Whether the target has no <answer> tags."""
        self.text = text
        if response_prefix(template):
            self.text = text.removeprefix("<think>")
            if "</think>" not in self.text:
                raise UserError(
                    f"--target {text}: the prompt template ends with <think>, and the target does not close it;"
                    f" use '</think><answer>{SLOT}</answer>', or another --template"
                )
        self.end = end_token(template, processor)

    def tokens(self, sample: Sample) -> list[int]:
        """Ids of the target, with the end token."""
        text = self.text.replace(SLOT, sample.answer)
        ids = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids if self.end in ids else [*ids, self.end]


def end_token(template: str, processor: Processor) -> int:
    """Id of the token that ends a target: `<|im_end|>` with a chat template, else the tokenizer's end token."""
    tokenizer = processor.tokenizer
    if END_OF_TURN in template:
        return tokenizer.convert_tokens_to_ids(END_OF_TURN)
    return processor.eos_ids[0] if tokenizer.eos_token_id is None else tokenizer.eos_token_id
