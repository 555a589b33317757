"""Selects one of several kernels for the same operation, some of which may not be installed."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence

import torch

from vtfast.utils.errors import UserError

log = logging.getLogger("vtfast")


def select_backend(
    operation: str,
    flag: str,
    requested: str,
    names: Sequence[str],
    is_usable: Callable[[str, torch.device, torch.dtype], bool],
    device: torch.device | str,
    dtype: torch.dtype,
) -> str:
    """`requested`, or for "auto" the first of `names` that is usable for `device` and `dtype`. Logged once.

    Raises UserError, with the flag's name, for a backend that is not usable.
    """
    device = torch.device(device)
    usable = [name for name in names if is_usable(name, device, dtype)]
    if requested not in ("auto", *usable):
        raise UserError(
            f"--{flag} {requested}: must be one of auto, {', '.join(usable)};"
            f" others are not installed, or not for {dtype} on {device.type}"
        )
    name = usable[0] if requested == "auto" else requested
    _log_once(operation, f"{device.type}, {str(dtype).removeprefix('torch.')}", name)
    return name


@functools.cache
def _log_once(operation: str, device: str, name: str) -> None:
    log.info("%s (%s): %s", operation, device, name)
