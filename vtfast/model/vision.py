"""The vision encoder: how its patches are embedded, and what is remembered of a frozen one within a step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.functional import linear

from vtfast.data.prompt import Prompt


class ImageMemory:
    """What a frozen vision tower made of each prompt's images, while `open`: rollout, reference and updates of a step
    then run it once. A tower that is trained is never remembered."""

    def __init__(self) -> None:
        self.features: dict[Prompt, Tensor] | None = None

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        self.features = {}
        try:
            yield
        finally:
            self.features = None


def embed_patches(self: nn.Module, patches: Tensor) -> Tensor:
    """In place of `forward` of a tower's patch embedding: [K, values of a patch] -> [K, E].

    Its 3-D convolution has one position a patch, so it is a matmul, and libraries that do not see that take several
    times as long. Not on the CPU, where the convolution is a small part and, unlike MKL's matmul, rounds a patch alike
    whatever its batch."""
    weight = self.proj.weight.flatten(1)
    return linear(patches.view(-1, weight.shape[1]).to(weight.dtype), weight, self.proj.bias)
