"""Images of a sample, kept encoded: decoded when read, checked once when loaded.

15,000 images of 512 x 512 are 12 GB as pixels and 0.5 GB as JPEG, so only the encoded form stays in
memory.

An image comes from anywhere, so little is taken on trust. Only FORMATS are looked at, whatever a file is called: every
decoder more is one more to be attacked, and some start other programs. Sizes are checked by what the header says,
before a pixel is decoded. A path must be that of a regular file: a device never ends, and a pipe waits for ever.
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
MAX_BYTES = 400_000_000  # encoded: more than MAX_PIXELS take without compression
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # of several frames, the first
ImageSource: TypeAlias = bytes | Path | Image.Image


class ImageError(UserError):
    """An image that cannot be used; the message says why, the caller adds which."""


def open_image(source: ImageSource | str) -> Image.Image:
    """Opens encoded bytes, a path or a PIL image (returned as it is). Pixels may still be unread.

    Raises:
        ImageError: no such file, not an image, or an image of forbidden size.
    """
    if isinstance(source, Image.Image):
        image = source
    else:
        check_file(source)
        try:
            with warnings.catch_warnings():  # the size check below says it better
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                file = io.BytesIO(source) if isinstance(source, bytes) else source
                image = Image.open(file, formats=FORMATS)
        except Image.DecompressionBombError:
            raise ImageError(f"image of more than {MAX_PIXELS} pixels") from None
        except UnidentifiedImageError:  # its message is the address of our buffer
            raise ImageError("not an image of any known format") from None
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and others
            raise ImageError(f"not a readable image ({first_line(error)})") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"image of {width} x {height} pixels, more than {MAX_PIXELS}")
    if min(width, height) < 2:
        raise ImageError(f"image of {width} x {height} pixels: a side of one pixel shows nothing")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ImageError(f"image of {width} x {height} pixels: aspect ratio above {MAX_RATIO}")
    return image


def check_file(source: ImageSource | str) -> None:
    """Raises ImageError for a path that is not that of a regular file with something in it, and for more encoded bytes
    than any allowed image has."""
    if isinstance(source, bytes):
        size = len(source)
    else:
        try:
            status = os.stat(source)  # follows links
        except FileNotFoundError:
            raise ImageError(f"no such file: {shorten(source)}") from None
        except (OSError, ValueError) as error:  # too long a name, a NUL byte in it, no permission
            reason = error.strerror if isinstance(error, OSError) else error
            raise ImageError(f"no usable path: {shorten(source)} ({reason})") from None
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"not a regular file: {shorten(source)}")
        size = status.st_size
    if not size:  # what /proc holds calls itself empty too
        raise ImageError("empty file")
    if size > MAX_BYTES:
        raise ImageError(f"{size} bytes, more than {MAX_BYTES}")


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
