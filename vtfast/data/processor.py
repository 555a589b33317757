"""Encodes text and images as a `Prompt`, the tensors of one question.

Uses the checkpoint's tokenizer and Qwen2-VL's PIL image processor (Qwen2.5-VL's is the same). AutoProcessor would need
torchvision, and its default image backend depends on whether torchvision is installed. A text model has only the
tokenizer.

Shapes: P prompt tokens (image tokens counted), I images, K patches of 14 x 14 pixels of all images.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError

from vtfast.data.images import MAX_PIXELS, ImageError, ImageSource, load_image
from vtfast.data.prompt import Prompt, _key, mrope_positions
from vtfast.data.resize import _resizer, resized_sides
from vtfast.utils.errors import UserError, error_prefix
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
            tokenizer.encode("a")  # looks at settings that loading does not
            image_processor = None if is_text_model(path) else Qwen2VLImageProcessorPil.from_pretrained(path)
            if image_processor is not None:
                _Preprocessing.model_validate(image_processor)
        except BaseException as error:  # libraries raise anything for damaged files, a panic of Rust too
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise UserError(
                f"cannot read the tokenizer and image processor of {path}: {_reason(error)}. A model folder "
                "holds tokenizer.json, tokenizer_config.json and preprocessor_config.json beside "
                "its weights"
            ) from error
        if image_processor is not None:
            size = image_processor.size
            low = size["shortest_edge"] if min_pixels is None else min_pixels
            high = size["longest_edge"] if max_pixels is None else max_pixels
            if not 0 < low <= min(high, MAX_PIXELS):
                raise UserError(
                    f"min_pixels {low} and max_pixels {high}: 0 < min <= max required, and min at most {MAX_PIXELS}"
                )
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
        if self.image_processor is None:
            raise UserError("images for a text model: it takes text-only questions")
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
        patch, unit = self._images.patch_size, self._images.merge_size * self._images.patch_size
        assert self.pixel_limits is not None
        sides = [resized_sides(width, height, *self.pixel_limits, patch) for width, height in sizes]
        image_tokens = sum(width * height // unit**2 for width, height in sides)
        return text_tokens - len(sizes) + image_tokens

    def decode(self, ids: Sequence[int] | torch.Tensor, keep_special: bool = False) -> str:
        """Text of token ids, without special tokens unless `keep_special`."""
        return self.tokenizer.decode(ids, skip_special_tokens=not keep_special, clean_up_tokenization_spaces=False)

    def resize(self, source: ImageSource | str) -> Image.Image:
        """An image as the model sees it: RGB, sides in whole pairs of patches, area within the limits.

        Raises:
            ImageError: an unusable image, or a shape that cannot be resized within the limits.
        """
        assert self.pixel_limits is not None
        image, settings = load_image(source), (*self.pixel_limits, self._images.patch_size)
        resized_sides(image.width, image.height, *settings)
        try:
            return _resizer()(image, *settings)
        except ValueError as error:
            raise ImageError(first_line(error)) from error

    def _pixels(self, images: Sequence[ImageSource | str]) -> tuple[torch.Tensor, torch.Tensor]:
        """-> pixels [K, 1176] float32, grid [I, 3] int64."""
        resized = []
        for number, source in enumerate(images, 1):
            name = source if isinstance(source, str | Path) else getattr(source, "filename", None)
            with error_prefix(f"image {number} of {len(images)}" + (f" ({name})" if name else "")):
                resized.append(self.resize(source))
        out = self._images(images=resized, do_resize=False, return_tensors="pt")
        return out["pixel_values"].float(), out["image_grid_thw"].long()


class _Preprocessing(BaseModel):
    """The numbers of a preprocessor_config.json from which patches are made."""

    model_config = ConfigDict(from_attributes=True, strict=True, allow_inf_nan=False)
    patch_size: int = Field(gt=0, le=64)
    merge_size: int = Field(gt=0, le=64)
    temporal_patch_size: int = Field(gt=0, le=64)
    size: "_PixelLimits"
    image_mean: tuple[float, float, float] = Field(strict=False)
    image_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = Field(strict=False)
    rescale_factor: float


class _PixelLimits(BaseModel):
    model_config = ConfigDict(from_attributes=True, strict=True)
    shortest_edge: int
    longest_edge: int


def _reason(error: BaseException) -> str:
    if not isinstance(error, ValidationError):
        return first_line(error).rstrip(".")
    wrong = error.errors()[0]
    return f"preprocessor_config.json: {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}"


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
    ids = eos if isinstance(eos, list) else [eos]
    if not ids or not all(type(token) is int and 0 <= token < len(tokenizer) for token in ids):
        raise UserError(f"{path}/generation_config.json: eos_token_id: {eos!r:.80} is not a token id")
    return ids
