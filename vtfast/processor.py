"""Text and images -> `Prompt`, the tensors of one question.

Composed of the checkpoint's tokenizer and Qwen2-VL's PIL image processor (Qwen2.5-VL's is the same): AutoProcessor
would need torchvision, and its default image backend changes with torchvision being there. A text model has the
tokenizer alone.

Shapes: P prompt tokens (image tokens counted), I images, K patches of 14 x 14 pixels of all images.
"""

import functools
import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from vtfast.errors import UserError
from vtfast.files import read_json
from vtfast.hub import model_path
from vtfast.images import MAX_PIXELS, MAX_RATIO, ImageError, Source, load_image

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
    )

log = logging.getLogger("vtfast")

IMAGE_PAD = "<|image_pad|>"
PLACEHOLDER = f"<|vision_start|>{IMAGE_PAD}<|vision_end|>"


@dataclass(eq=False)
class Prompt:
    """One question as tensors, on the CPU."""

    ids: torch.Tensor
    """[P] int64; every image is its number of merged tokens (a quarter of its patches)."""
    positions: torch.Tensor
    """[3, P] int64: M-RoPE's time, height and width, from 0."""
    pixels: torch.Tensor | None = None
    """[K, 1176] float32 normalised patches of all images, None without images."""
    grid: torch.Tensor | None = None
    """[I, 3] int64: 1, patch rows, patch columns of every image."""
    key: int = 0
    """63-bit hash of ids and pixels: equal prompts sample equally wherever they stand."""
    text: str = ""
    """The text that was encoded."""
    image_mask: torch.Tensor | None = None
    """[P] bool: where image features replace embeddings. Completions never count as images."""
    images: Sequence[Source | str] = ()
    """What the pixels were made of."""

    @property
    def rope_delta(self) -> int:
        """Completion token j sits at position P + rope_delta + j on all three axes."""
        return int(self.positions.max()) + 1 - self.ids.shape[0]

    @property
    def patches(self) -> list[int]:
        """Of each image."""
        return [] if self.grid is None else self.grid.prod(-1).tolist()


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
            min_pixels: least area of an image behind resizing; the checkpoint's own where None.
                `save_pretrained` writes the limits in use.
            max_pixels: largest area, likewise.

        Raises:
            UserError: no such checkpoint, or no tokenizer or image processor in it.
        """
        path = model_path(path)
        from transformers import AutoTokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )

        try:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            if is_text_model(path):
                return cls(tokenizer, None, _eos_ids(path, tokenizer))
            image_processor = Qwen2VLImageProcessorPil.from_pretrained(path)
        except UserError:
            raise
        except (
            BaseException
        ) as error:  # strangers' files meet libraries: anything may come, a panic of Rust too
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"cannot read the tokenizer and image processor of {path}: {reason} A model folder "
                "holds tokenizer.json, tokenizer_config.json and preprocessor_config.json beside "
                "its weights"
            ) from error
        check_preprocessing(image_processor, path)
        size = image_processor.size
        low = size["shortest_edge"] if min_pixels is None else min_pixels
        high = size["longest_edge"] if max_pixels is None else max_pixels
        if not 0 < low <= high:
            raise UserError(f"min_pixels {low} and max_pixels {high}: 0 < min <= max is needed")
        if low > MAX_PIXELS:
            raise UserError(
                f"min_pixels {low}: images would be enlarged beyond {MAX_PIXELS} pixels"
            )
        image_processor.size = {"shortest_edge": low, "longest_edge": high}
        _resizer()  # chosen, and said in the log, before any work starts
        return cls(tokenizer, image_processor, _eos_ids(path, tokenizer))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes tokenizer, chat template and image processor so that transformers reads them."""
        self.tokenizer.save_pretrained(folder)
        if self.image_processor is not None:
            self.image_processor.save_pretrained(folder)

    @property
    def pixel_limits(self) -> tuple[int, int] | None:
        """Least and largest area of an image, in pixels; None for a text model."""
        if self.image_processor is None:
            return None
        size = self.image_processor.size
        return size["shortest_edge"], size["longest_edge"]

    def encode(self, text: str, images: Sequence[Source | str]) -> Prompt:
        """Tokens, positions and pixels of one rendered prompt.

        Args:
            text: with one `<|vision_start|><|image_pad|><|vision_end|>` per image, in order.
            images: PIL images (or encoded bytes, or paths); empty for a text-only prompt.

        Raises:
            UserError: another number of placeholders than images, or an unusable image.
        """
        found = text.count(PLACEHOLDER)
        if found != len(images) or text.count(IMAGE_PAD) != found:
            raise UserError(
                f"the prompt has {found} image placeholders ({text.count(IMAGE_PAD)} {IMAGE_PAD}) "
                f"for {len(images)} images: write {PLACEHOLDER} once per image in {text[:80]!r}"
            )
        if found and self.image_processor is None:
            raise UserError(f"{found} images for a text model: it reads text-only questions")
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UserError("the prompt is empty: there is nothing to continue")
        pixels, grid, merge = None, None, 1
        if found:
            merge = self.image_processor.merge_size
            pixels, grid = self._pixels(images)
            counts = iter((grid.prod(-1) // merge**2).tolist())
            pad = self.image_pad_id
            ids = [t for i in ids for t in ([i] * next(counts) if i == pad else [i])]
        ids = torch.tensor(ids, dtype=torch.int64)
        mask = ids == self.image_pad_id if found else torch.zeros_like(ids, dtype=torch.bool)
        positions = mrope_positions(mask, grid, merge)
        return Prompt(ids, positions, pixels, grid, _key(ids, pixels, grid), text, mask, images)

    def prompt_length(self, text: str, sizes: Sequence[tuple[int, int]]) -> int:
        """Tokens that `encode` would make, told from the images' (width, height) alone.

        Raises:
            UserError: an image that cannot be resized within the limits.
        """
        text_tokens = len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if not sizes:
            return text_tokens
        if self.image_processor is None:
            raise UserError(f"{len(sizes)} images for a text model: it reads text-only questions")
        patch = self.image_processor.patch_size
        limits = *self.pixel_limits, patch
        try:
            sides = [resized_sides(*wide_high, *limits) for wide_high in sizes]
        except ValueError as error:
            raise UserError(f"an image of the prompt: {error}") from error
        unit = self.image_processor.merge_size * patch
        image_tokens = sum(width * height // unit**2 for width, height in sides)
        return text_tokens - len(sizes) + image_tokens

    def decode(self, ids: Sequence[int] | torch.Tensor, keep_special: bool = False) -> str:
        """Text of token ids; end marks and other special tokens are left out unless asked for."""
        return self.tokenizer.decode(
            ids, skip_special_tokens=not keep_special, clean_up_tokenization_spaces=False
        )

    def resize(self, source: Source | str) -> Image.Image:
        """An image as the model sees it: RGB, sides in whole pairs of patches, area within the limits.

        Raises:
            ImageError: an unusable image.
            ValueError: a shape that cannot be resized within the limits.
        """
        return _resizer()(load_image(source), *self.pixel_limits, self.image_processor.patch_size)

    def _pixels(self, images: Sequence[Source | str]) -> tuple[torch.Tensor, torch.Tensor]:
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
        out = self.image_processor(images=resized, do_resize=False, return_tensors="pt")
        return out["pixel_values"].float(), out["image_grid_thw"].long()


def check_preprocessing(processor: "Qwen2VLImageProcessorPil", path: str | Path) -> None:
    """Raises UserError for a preprocessor_config.json whose numbers an image cannot be made into patches with."""

    def wrong(name: str, value: object) -> UserError:
        return UserError(f"{path}/preprocessor_config.json: {name}: {value!r:.80} cannot be used")

    for name in ("patch_size", "merge_size", "temporal_patch_size"):
        value = getattr(processor, name, None)
        if type(value) is not int or not 0 < value <= 64:
            raise wrong(name, value)
    for name in ("shortest_edge", "longest_edge"):
        value = processor.size[name] if name in (processor.size or ()) else None
        if type(value) is not int:
            raise wrong(f"size.{name}", value)
    numbers = {
        "image_mean": processor.image_mean,
        "image_std": processor.image_std,
        "rescale_factor": [processor.rescale_factor],
    }
    for name, values in numbers.items():
        known = isinstance(values, list | tuple) and len(values) == (3 if "image" in name else 1)
        if not known or not all(type(x) in (int, float) and math.isfinite(x) for x in values):
            raise wrong(name, values)
    if 0 in processor.image_std:
        raise wrong("image_std", processor.image_std)


def is_text_model(path: str | Path) -> bool:
    """Whether a checkpoint's configuration, where there is one, knows of no vision tower."""
    from transformers import PreTrainedConfig

    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        return False
    return "vision_config" not in PreTrainedConfig.get_config_dict(path)[0]


def mrope_positions(mask: torch.Tensor, grid: torch.Tensor | None, merge: int = 2) -> torch.Tensor:
    """Multimodal rotary positions of one sequence, as the model's own `get_rope_index` has them.

    A text token takes the next number on all three axes. An image's tokens share the time at which
    it starts; height and width count its merged rows and columns from there. Text goes on behind
    the longer side.

    Args:
        mask: [P] bool, true at image tokens.
        grid: [I, 3] patches of every image; None without images.

    Returns:
        [3, P] int64.
    """
    axes, done, position = [], 0, 0
    for frames, rows, columns in [] if grid is None else grid.tolist():
        start = done + int(mask[done:].to(torch.uint8).argmax())
        axes.append(torch.arange(position, position + start - done).expand(3, -1))
        position += start - done
        rows, columns = rows // merge, columns // merge
        axes.append(torch.cartesian_prod(*map(torch.arange, (frames, rows, columns))).T + position)
        position += max(rows, columns)
        done = start + frames * rows * columns
    axes.append(torch.arange(position, position + len(mask) - done).expand(3, -1))
    return torch.cat(axes, dim=1)


def resize_image(
    image: Image.Image, min_pixels: int, max_pixels: int, patch_size: int = 14
) -> Image.Image:
    """What `qwen_vl_utils` makes of an image, where that library cannot be imported.

    Transparent RGBA goes on white, everything becomes RGB; sides become multiples of two patches
    (bicubic) with an area within the limits.

    Raises:
        ValueError: aspect ratio above 200, or sides that would vanish.
    """
    if image.mode == "RGBA":
        opaque = Image.new("RGB", image.size, (255, 255, 255))
        opaque.paste(image, mask=image.getchannel("A"))
        image = opaque
    else:
        image = image.convert("RGB")
    return image.resize(resized_sides(*image.size, min_pixels, max_pixels, patch_size))


def resized_sides(
    width: int, height: int, min_pixels: int, max_pixels: int, patch_size: int = 14
) -> tuple[int, int]:
    """Width and height behind resizing: multiples of two patches, with an area within the limits.

    Raises:
        ValueError: aspect ratio above 200, or a strip too thin for `max_pixels`.
    """
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(f"aspect ratio above {MAX_RATIO}")
    unit = 2 * patch_size
    sides = [max(unit, round(side / unit) * unit) for side in (width, height)]
    area = sides[0] * sides[1]
    if area > max_pixels:
        shrink = math.sqrt(width * height / max_pixels)
        sides = [math.floor(side / shrink / unit) * unit for side in (width, height)]
    elif area < min_pixels:
        grow = math.sqrt(min_pixels / (width * height))
        sides = [math.ceil(side * grow / unit) * unit for side in (width, height)]
    if min(sides) == 0:
        raise ValueError(f"{width} x {height} pixels: max_pixels leaves nothing of the short side")
    return sides[0], sides[1]


def _utils_resize(
    image: Image.Image, min_pixels: int, max_pixels: int, patch_size: int = 14
) -> Image.Image:
    from qwen_vl_utils import process_vision_info

    item = {"type": "image", "image": image, "min_pixels": min_pixels, "max_pixels": max_pixels}
    turn = {"role": "user", "content": [item]}
    return process_vision_info([turn], image_patch_size=patch_size)[0][0]


@functools.cache
def _resizer() -> Callable[[Image.Image, int, int, int], Image.Image]:
    """qwen_vl_utils where it imports, the mirror above where not. Chosen once in a process."""
    try:
        import qwen_vl_utils  # noqa: F401
    except Exception as error:  # torchvision missing or broken: ImportError, RuntimeError, OSError
        log.info(
            "images are resized by vtfast, to the same pixels: qwen_vl_utils does not import (%s)",
            error,
        )
        return resize_image
    log.info("images are resized by qwen_vl_utils")
    return _utils_resize


def _eos_ids(path: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """End tokens of the checkpoint's generation_config; its sampling settings are never read."""
    from transformers.utils.hub import cached_file

    file = cached_file(path, "generation_config.json", _raise_exceptions_for_missing_entries=False)
    eos = read_json(Path(file)).get("eos_token_id") if file else None
    if eos is None:
        eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError(f"{path} names no end token: set eos_token_id in generation_config.json")
    ids = eos if isinstance(eos, list) else [eos]
    if not ids or not all(type(token) is int and 0 <= token < len(tokenizer) for token in ids):
        raise UserError(f"{path}/generation_config.json: eos_token_id: {eos!r:.80} is no token")
    return ids


def _key(ids: torch.Tensor, pixels: torch.Tensor | None, grid: torch.Tensor | None) -> int:
    digest = hashlib.blake2b(ids.numpy().tobytes(), digest_size=8)
    if pixels is not None:
        digest.update(grid.numpy().tobytes())
        digest.update(pixels.contiguous().numpy().data)
    return int.from_bytes(digest.digest(), "little") >> 1
