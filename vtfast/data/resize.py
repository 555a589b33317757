"""Resizes images as `qwen_vl_utils` does: by that library, or by the same rule here if it cannot be imported."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable

from PIL import Image

from vtfast.data.images import ImageError

log = logging.getLogger("vtfast")


def resize_image(image: Image.Image, min_pixels: int, max_pixels: int, patch_size: int = 14) -> Image.Image:
    """The result of `qwen_vl_utils` without that library.

    RGBA is put on white, everything becomes RGB; sides become multiples of two patches (bicubic) with an area within
    the limits.

    Raises:
        ImageError: a strip too thin for `max_pixels`.
    """
    if image.mode == "RGBA":
        opaque = Image.new("RGB", image.size, (255, 255, 255))
        opaque.paste(image, mask=image.getchannel("A"))
        image = opaque
    else:
        image = image.convert("RGB")
    return image.resize(resized_sides(image.width, image.height, min_pixels, max_pixels, patch_size))


def resized_sides(width: int, height: int, min_pixels: int, max_pixels: int, patch_size: int = 14) -> tuple[int, int]:
    """Width and height after resizing: multiples of two patches, with an area within the limits.

    Raises:
        ImageError: a strip too thin for `max_pixels`.
    """
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
        raise ImageError(f"image of {width} x {height} pixels: max_pixels leaves nothing of the short side")
    return sides[0], sides[1]


def _qwen_resize(image: Image.Image, min_pixels: int, max_pixels: int, patch_size: int = 14) -> Image.Image:
    from qwen_vl_utils import process_vision_info

    item = {"type": "image", "image": image, "min_pixels": min_pixels, "max_pixels": max_pixels}
    turn = {"role": "user", "content": [item]}
    return process_vision_info([turn], image_patch_size=patch_size)[0][0]


@functools.cache
def _resizer() -> Callable[[Image.Image, int, int, int], Image.Image]:
    """qwen_vl_utils if it can be imported, else `resize_image`. Chosen once in a process."""
    try:
        import qwen_vl_utils  # noqa: F401
    except Exception as error:  # torchvision missing or broken: ImportError, RuntimeError, OSError
        log.info("images are resized by vtfast, to the same pixels: qwen_vl_utils does not import (%s)", error)
        return resize_image
    log.info("images are resized by qwen_vl_utils")
    return _qwen_resize
