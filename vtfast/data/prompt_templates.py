"""Prompt templates: small text files, one prompt each.

A template is text with slots, all optional but `{question}`:

    {images}         one `<|vision_start|><|image_pad|><|vision_end|>` per image; without the slot they stand in front
    {literal_image}  the text `<image>` where `--literal_image` asks for it, else nothing
    {question}       the question as the data set asks it
    {options}        `a, b or c`; nothing for an open question
    [[ … ]]          text around a slot, left out with it where the slot is empty: `[[ Choose: {options}]]`

Everything else is taken literally, so braces, tags and ChatML marks need no escaping, nor do double brackets without a
slot. One line feed at the end of the file belongs to the file and not to the prompt (editors put it there): a ChatML
template, whose prompt ends with a line feed, therefore ends with an empty line.

Of VisualThinker-R1-Zero, letter by letter for questions with options (the two spaces behind `User:` are its own):
    r1-zero               for a base model, which goes on behind `<think>`
    r1-zero-direct        the same without reasoning
    instruct              for an instruction-tuned model: thinking and answer in tags
    instruct-reflection   the same and a sentence on reflection; from the authors' development code
    instruct-answer       the answer's tag alone, as their Table 4 mentions; the wording is ours
Of others:
    r1-v                  R1-V's: as `instruct`, but it asks for a number
    open-r1               open-r1's system prompt, as open-r1-multimodal and R1-Multimodal-Journey use it
    r1-zero-text          for a base language model, after DeepSeek-R1-Zero's idea; the wording is ours
    brief                 the short one for the embedded tiny model
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vtfast.utils.errors import UserError, error_prefix
from vtfast.utils.files import expand, read_text

if TYPE_CHECKING:
    from vtfast.data import Sample

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
TEMPLATES = Path(__file__).parent / "templates"
_SLOT = re.compile(r"\{(images|literal_image|question|options)\}")
_OPTIONAL = re.compile(r"\[\[((?:(?!\[\[|\]\]).)*)\]\]", re.DOTALL)


def template_names() -> list[str]:
    """Names of the templates that come with vtfast."""
    return sorted(path.stem for path in TEMPLATES.glob("*.txt"))


def load_template(name_or_path: str | Path) -> str:
    """Text of a template, by its name here or by the path of a text file.

    Raises:
        UserError: no such name (the nearest one is suggested), unreadable file, or no `{question}`
        in it.
    """
    name = str(name_or_path)
    if name.endswith(".txt") or "/" in name or "\\" in name:
        path = expand(name)
    elif name in template_names():
        path = TEMPLATES / f"{name}.txt"
    else:
        near = difflib.get_close_matches(name, template_names(), n=1, cutoff=0.0)
        raise UserError(
            f"unknown prompt template {name!r}: did you mean {near[0]!r}? "
            f"Templates: {', '.join(template_names())}, or the path of a .txt file"
        )
    with error_prefix("cannot read the prompt template"):
        text = read_text(path).removesuffix("\n")
    if "{question}" not in text:
        raise UserError(f"the prompt template {path} lacks {{question}}: write it where it goes")
    return text


def join_options(options: Sequence[str]) -> str:
    """`a`, `a or b`, `a, b or c`: the way VisualThinker lists options."""
    return " or ".join(filter(None, (", ".join(options[:-1]), *options[-1:])))


def render(template: str, sample: "Sample", *, literal_image: bool = False) -> str:
    """The prompt text of one sample, ready for `Processor.encode(text, sample.images)`.

    `literal_image`: fill the slot of that name with the text `<image>`, which VisualThinker's prompts carry by an
    oversight; left empty otherwise, and for samples without images.

    Slots are filled in one pass, so text that came from the data (a question with braces in it) is
    never filled again.
    """
    images = IMAGE * len(sample.images)
    slots = {
        "images": images,
        "literal_image": "<image>" if literal_image and images else "",
        "question": sample.question,
        "options": join_options(sample.options),
    }

    def part(found: re.Match) -> str:
        names = _SLOT.findall(found[1])
        if not names:
            return found[0]
        return found[1] if all(slots[name] for name in names) else ""

    text = _SLOT.sub(lambda slot: slots[slot[1]], _OPTIONAL.sub(part, template))
    return text if "{images}" in template else images + text


def response_prefix(template: str) -> str:
    """What the prompt already wrote of the response: `<think>` where it ends with it, else ""."""
    return "<think>" if template.endswith("<think>") else ""
