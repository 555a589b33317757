"""Encodes text and images as a `Prompt`, the tensors of one question.

Uses the checkpoint's tokenizer and Qwen2-VL's PIL image processor (Qwen2.5-VL's is the same). AutoProcessor would need
torchvision, and its default image backend depends on whether torchvision is installed. A text model has only the
tokenizer.

Shapes: P prompt tokens (image tokens counted), I images, K patches of 14 x 14 pixels of all images.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from vtfast.data.images import MAX_PIXELS, ImageError, ImageSource, load_image
from vtfast.data.prompt import Prompt, _key, mrope_positions
from vtfast.data.resize import _resizer, resized_sides
from vtfast.utils.errors import UserError
from vtfast.utils.files import read_json
from vtfast.utils.hub import model_path
from vtfast.utils.text import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

log = logging.getLogger("vtfast")

IMAGE_PAD = "<|image_pad|>"
PLACEHOLDER = f"<|vision_start|>{IMAGE_PAD}<|vision_end|>"


class Processor:
    """Tokenizer and image processor of a checkpoint; a text model's has no image processor."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        image_processor: "Qwen2VLImageProcessorPil | None",
        eos_ids: Sequence[int],
    ) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.eos_ids = list(eos_ids)
        """Tokens that end a response."""
        self.image_pad_id = tokenizer.convert_tokens_to_ids(IMAGE_PAD)
        known = self.image_pad_id not in (None, tokenizer.unk_token_id)
        if image_processor is not None and not known:
            raise UserError(f"the tokenizer has no {IMAGE_PAD} token: not a Qwen2-VL checkpoint")

    @classmethod
    def from_pretrained(
        cls, path: str | Path, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> "Processor":
        """Reads a checkpoint folder or hub id.

        Args:
            min_pixels: smallest area of a resized image; None: the checkpoint's own. `save_pretrained` writes the
                limits in use.
            max_pixels: largest area, likewise.

        Raises:
            UserError: no such checkpoint, or no tokenizer or image processor in it.
        """
        path = model_path(path)
        from transformers import AutoTokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        try:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            if is_text_model(path):
                return cls(tokenizer, None, _eos_ids(path, tokenizer))
            image_processor = Qwen2VLImageProcessorPil.from_pretrained(path)
        except (UserError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # libraries raise anything for damaged files, a panic of Rust too
            raise UserError(
                f"cannot read the tokenizer and image processor of {path}: {first_line(error)} A model folder "
                "holds tokenizer.json, tokenizer_config.json and preprocessor_config.json beside "
                "its weights"
            ) from error
        check_preprocessing(image_processor, path)
        size = image_processor.size
        low = size["shortest_edge"] if min_pixels is None else min_pixels
        high = size["longest_edge"] if max_pixels is None else max_pixels
        if not 0 < low <= high:
            raise UserError(f"min_pixels {low} and max_pixels {high}: 0 < min <= max required")
        if low > MAX_PIXELS:
            raise UserError(f"min_pixels {low}: would enlarge images beyond {MAX_PIXELS} pixels")
        image_processor.size = {"shortest_edge": low, "longest_edge": high}
        _resizer()  # chosen and logged before any work starts
        return cls(tokenizer, image_processor, _eos_ids(path, tokenizer))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes tokenizer, chat template and image processor so that transformers reads them."""
        self.tokenizer.save_pretrained(folder)
        if self.image_processor is not None:
            self.image_processor.save_pretrained(folder)

    @property
    def pixel_limits(self) -> tuple[int, int] | None:
        """Smallest and largest area of an image, in pixels; None for a text model."""
        if self.image_processor is None:
            return None
        size = self.image_processor.size
        return size["shortest_edge"], size["longest_edge"]

    @property
    def _images(self) -> "Qwen2VLImageProcessorPil":
        assert self.image_processor is not None, "callers refuse images for a text model"
        return self.image_processor

    def encode(self, text: str, images: Sequence[ImageSource | str]) -> Prompt:
        """Tokens, positions and pixels of one rendered prompt.

        Args:
            text: with one `<|vision_start|><|image_pad|><|vision_end|>` per image, in order.
            images: PIL images (or encoded bytes, or paths); empty for a text-only prompt.

        Raises:
            UserError: another number of placeholders than images, or an unusable image.
        """
        count = text.count(PLACEHOLDER)
        if count != len(images) or text.count(IMAGE_PAD) != count:
            raise UserError(
                f"the prompt has {count} image placeholders ({text.count(IMAGE_PAD)} {IMAGE_PAD}) "
                f"for {len(images)} images: write {PLACEHOLDER} once per image in {text[:80]!r}"
            )
        self._check_accepts(count)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UserError("the prompt is empty")
        pixels, grid, merge = None, None, 1
        if count:
            merge = self._images.merge_size
            pixels, grid = self._pixels(images)
            counts = iter((grid.prod(-1) // merge**2).tolist())
            pad = self.image_pad_id
            ids = [t for i in ids for t in ([i] * next(counts) if i == pad else [i])]
        ids = torch.tensor(ids, dtype=torch.int64)
        mask = ids == self.image_pad_id if count else torch.zeros_like(ids, dtype=torch.bool)
        positions = mrope_positions(mask, grid, merge)
        return Prompt(ids, positions, pixels, grid, _key(ids, pixels, grid), text, mask, images)

    def prompt_length(self, text: str, sizes: Sequence[tuple[int, int]]) -> int:
        """Number of tokens that `encode` would return, from the images' (width, height) alone.

        Raises:
            UserError: an image that cannot be resized within the limits.
        """
        text_tokens = len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if not sizes:
            return text_tokens
        self._check_accepts(len(sizes))
        assert self.pixel_limits is not None
        low, high = self.pixel_limits
        patch = self._images.patch_size
        try:
            sides = [resized_sides(width, height, low, high, patch) for width, height in sizes]
        except ValueError as error:
            raise UserError(f"an image of the prompt: {error}") from error
        unit = self._images.merge_size * patch
        image_tokens = sum(width * height // unit**2 for width, height in sides)
        return text_tokens - len(sizes) + image_tokens

    def _check_accepts(self, images: int) -> None:
        if images and self.image_processor is None:
            raise UserError(f"{images} images for a text model: it takes text-only questions")

    def decode(self, ids: Sequence[int] | torch.Tensor, keep_special: bool = False) -> str:
        """Text of token ids, without special tokens unless `keep_special`."""
        return self.tokenizer.decode(ids, skip_special_tokens=not keep_special, clean_up_tokenization_spaces=False)

    def resize(self, source: ImageSource | str) -> Image.Image:
        """An image as the model sees it: RGB, sides in whole pairs of patches, area within the limits.

        Raises:
            ImageError: an unusable image.
            ValueError: a shape that cannot be resized within the limits.
        """
        assert self.pixel_limits is not None
        low, high = self.pixel_limits
        return _resizer()(load_image(source), low, high, self._images.patch_size)

    def _pixels(self, images: Sequence[ImageSource | str]) -> tuple[torch.Tensor, torch.Tensor]:
        """-> pixels [K, 1176] float32, grid [I, 3] int64."""
        resized = []
        for number, source in enumerate(images):
            try:
                resized.append(self.resize(source))
            except (ImageError, ValueError) as error:
                is_path = isinstance(source, str | Path)
                name: object = source if is_path else getattr(source, "filename", None)
                which = f"image {number + 1} of {len(images)}" + (f" ({name})" if name else "")
                raise UserError(f"{which}: {error}") from error
        out = self._images(images=resized, do_resize=False, return_tensors="pt")
        return out["pixel_values"].float(), out["image_grid_thw"].long()


def check_preprocessing(processor: "Qwen2VLImageProcessorPil", path: str | Path) -> None:
    """Raises UserError for a preprocessor_config.json with numbers that cannot make patches of an image."""
    for name, value, valid in _preprocessing_values(processor):
        if not valid:
            raise UserError(f"{path}/preprocessor_config.json: {name}: {value!r:.80} cannot be used")


def _preprocessing_values(processor: "Qwen2VLImageProcessorPil") -> Iterator[tuple[str, object, bool]]:
    """(name, value, whether it can be used)"""
    for name in ("patch_size", "merge_size", "temporal_patch_size"):
        value = getattr(processor, name, None)
        yield name, value, type(value) is int and 0 < value <= 64
    for name in ("shortest_edge", "longest_edge"):
        value = processor.size[name] if name in (processor.size or ()) else None
        yield f"size.{name}", value, type(value) is int
    numbers = {
        "image_mean": processor.image_mean,
        "image_std": processor.image_std,
        "rescale_factor": [processor.rescale_factor],
    }
    for name, values in numbers.items():
        complete = isinstance(values, list | tuple) and len(values) == (3 if "image" in name else 1)
        yield name, values, complete and all(type(x) in (int, float) and math.isfinite(x) for x in values)
    yield "image_std", processor.image_std, 0 not in processor.image_std


def is_text_model(path: str | Path) -> bool:
    """Whether a checkpoint's configuration, if it has one, has no vision encoder."""
    from transformers import PreTrainedConfig

    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        return False
    return "vision_config" not in PreTrainedConfig.get_config_dict(path)[0]


def _eos_ids(path: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """End tokens of the checkpoint's generation_config; its sampling settings are never read."""
    from transformers.utils.hub import cached_file

    file = cached_file(path, "generation_config.json", _raise_exceptions_for_missing_entries=False)
    eos = read_json(Path(file)).get("eos_token_id") if file else None
    if eos is None:
        eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError(f"{path} has no end token: set eos_token_id in generation_config.json")
    ids = eos if isinstance(eos, list) else [eos]
    if not ids or not all(type(token) is int and 0 <= token < len(tokenizer) for token in ids):
        raise UserError(f"{path}/generation_config.json: eos_token_id: {eos!r:.80} is not a token id")
    return ids
