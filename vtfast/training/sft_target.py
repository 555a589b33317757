"""What a sample's model answer looks like: its text, and its tokens up to the end mark.

A target is text with the slot {answer}, all else taken literally. Special tokens may be written in it; those in the
data are refused when it is loaded.
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
    """A target's text, given as it is or by the path of a .txt file (whose last line feed belongs to the file).

    Raises UserError for a file that cannot be read, and without {answer}."""
    text = text_or_path
    if text.endswith(".txt"):
        try:
            text = read_text(expand(text))
        except UserError as error:
            raise UserError(f"--target {error}") from None
        text = text.removesuffix("\n")
    if SLOT not in text:
        raise UserError(f"--target {text_or_path}: lacks {SLOT}; write it where the answer goes")
    return text


class Target:
    """Turns samples into the tokens that follow their prompts."""

    def __init__(self, text: str, template: str, processor: Processor) -> None:
        """`template`: text of the prompt template. Where it ends with `<think>`, a target may repeat that.

        Raises UserError for a target that would leave the prompt's `<think>` open."""
        self.processor = processor
        self.is_bare = "<answer>" not in text
        """Whether the answer stands without tags."""
        self.text = text
        if response_prefix(template):
            self.text = text.removeprefix("<think>")
            if "</think>" not in self.text:
                raise UserError(
                    f"--target {text}: the prompt template ends with <think>, which nothing closes;"
                    f" use '</think><answer>{SLOT}</answer>', or another --template"
                )
        self.end = end_token(template, processor)

    def tokens(self, sample: Sample) -> list[int]:
        """Ids of the target, end mark included."""
        text = self.text.replace(SLOT, sample.answer)
        ids = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids if self.end in ids else [*ids, self.end]


def end_token(template: str, processor: Processor) -> int:
    """Id of the token that ends an answer: `<|im_end|>` behind a chat template, else the tokenizer's own end mark."""
    tokenizer = processor.tokenizer
    if END_OF_TURN in template:
        return tokenizer.convert_tokens_to_ids(END_OF_TURN)
    return processor.eos_ids[0] if tokenizer.eos_token_id is None else tokenizer.eos_token_id
