"""A tokenized prompt: ids, M-RoPE positions, image patches.

Shapes: P prompt tokens (image tokens counted), I images, K patches of all images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vtfast.data.images import ImageSource


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
    images: Sequence[ImageSource | str] = ()
    """The sources of the pixels."""

    @property
    def rope_delta(self) -> int:
        """Completion token j sits at position P + rope_delta + j on all three axes."""
        return int(self.positions.max()) + 1 - self.ids.shape[0]

    @property
    def patches(self) -> list[int]:
        """Number of patches of each image."""
        return [] if self.grid is None else self.grid.prod(-1).tolist()


def mrope_positions(mask: torch.Tensor, grid: torch.Tensor | None, merge: int = 2) -> torch.Tensor:
    """Multimodal rotary positions of one sequence, equal to the model's own `get_rope_index`.

    A text token takes the next number on all three axes. An image's tokens share the time at which it starts; height
    and width count its merged rows and columns from there. Text continues after the longer side.

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


def _key(ids: torch.Tensor, pixels: torch.Tensor | None, grid: torch.Tensor | None) -> int:
    digest = hashlib.blake2b(ids.numpy().tobytes(), digest_size=8)
    if pixels is not None:
        assert grid is not None
        digest.update(grid.numpy().tobytes())
        digest.update(pixels.contiguous().numpy().data)
    return int.from_bytes(digest.digest(), "little") >> 1
