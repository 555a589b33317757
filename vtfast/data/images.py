"""Images of a sample, kept encoded: decoded when read, checked once when loaded.

15,000 images of 512 x 512 are 12 GB as pixels and 0.5 GB as JPEG, so only the encoded form stays in
memory.

Images are untrusted input. Only FORMATS are decoded, whatever a file's name is: every decoder can be attacked, and some
start other programs. Sizes are checked from the header, before any pixel is decoded. A path must be that of a regular
file: a device never ends, and a pipe blocks.
"""

import io
import os
import stat
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeAlias, overload

from PIL import Image, UnidentifiedImageError

from vtfast.utils.errors import UserError
from vtfast.utils.text import first_line, shorten

MAX_PIXELS = 89_478_485  # PIL's own limit for a decompression bomb: 256 MB as RGB
MAX_RATIO = 200  # Qwen2-VL's resizing refuses longer strips
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # of several frames, the first
ImageSource: TypeAlias = bytes | Path | Image.Image


class ImageError(UserError):
    """An image that cannot be used; the message says why, and the caller adds which image it is."""


def open_image(source: ImageSource | str) -> Image.Image:
    """Opens encoded bytes, a path or a PIL image (returned as it is). Pixels may still be unread.

    Raises:
        ImageError: no such file, not an image, or an image of forbidden size.
    """
    try:
        image = source if isinstance(source, Image.Image) else _open(source)
        problem = _size_problem(*image.size)
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and others
        problem = _open_problem(error)
    if problem:
        raise ImageError(problem)
    return image


def _open(source: bytes | Path | str) -> Image.Image:
    if not isinstance(source, bytes) and not stat.S_ISREG(os.stat(source).st_mode):  # follows links
        raise ImageError(f"not a regular file: {shorten(source)}")
    with warnings.catch_warnings():  # `_size_problem` has a better message
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)


def _open_problem(error: Exception) -> str:
    if isinstance(error, ImageError):
        return str(error)
    if isinstance(error, FileNotFoundError):
        return f"no such file: {shorten(error.filename)}"
    if isinstance(error, Image.DecompressionBombError):
        return f"image of more than {MAX_PIXELS} pixels"
    if isinstance(error, UnidentifiedImageError):  # its message is the address of our buffer
        return "not an image of any known format"
    return f"not a readable image ({first_line(error)})"


def _size_problem(width: int, height: int) -> str | None:
    image = f"image of {width} x {height} pixels"
    if width * height > MAX_PIXELS:
        return f"{image}, more than {MAX_PIXELS}"
    if min(width, height) < 2:
        return f"{image}: a side of one pixel shows nothing"
    return f"{image}: aspect ratio above {MAX_RATIO}" if max(width, height) > MAX_RATIO * min(width, height) else None


def load_image(source: ImageSource | str) -> Image.Image:
    """`open_image`, with all pixels read.

    Raises:
        ImageError: as there, or truncated or otherwise corrupt data.
    """
    return _read(open_image(source))


def check_image(source: ImageSource | str) -> None:
    """Decodes an image once and drops it.

    Raises:
        ImageError: what `load_image` would raise.
    """
    image = open_image(source)
    if image.format == "JPEG" and image is not source:
        image.draft(None, (image.width // 8, image.height // 8))  # all bytes read, fewer pixels
    _read(image)


def _read(image: Image.Image) -> Image.Image:
    try:
        image.load()
    except Exception as error:
        raise ImageError(f"corrupt image ({first_line(error)})") from error
    return image


def image_sizes(images: Sequence[Image.Image]) -> list[tuple[int, int]]:
    """(width, height) of each image; encoded ones are only opened, not decoded."""
    sources = images._sources if isinstance(images, Images) else images
    return [open_image(source).size for source in sources]


class Images(Sequence[Image.Image]):
    """The images of one sample: a sequence that decodes an image whenever it is read."""

    __slots__ = ("_sources",)

    def __init__(self, sources: Iterable[ImageSource]) -> None:
        self._sources = tuple(sources)

    def __len__(self) -> int:
        return len(self._sources)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> "Images": ...
    def __getitem__(self, index: int | slice) -> "Image.Image | Images":
        if isinstance(index, slice):
            return Images(self._sources[index])
        return load_image(self._sources[index])

    def __repr__(self) -> str:
        return f"Images({len(self)})"
