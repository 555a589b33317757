"""Choosing among kernels that may be installed or not: once, and said once in the log."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence

import torch

from vtfast.utils.errors import UserError

log = logging.getLogger("vtfast")


def choose(
    what: str,
    flag: str,
    wanted: str,
    names: Sequence[str],
    usable: Callable[[str, torch.device, torch.dtype], bool],
    device: torch.device | str,
    dtype: torch.dtype,
) -> str:
    """`wanted`, or for "auto" the first of `names` that is usable there.

    Raises UserError, naming the flag, for one that is unknown, not installed, or not for this device and dtype.
    """
    device = torch.device(device)
    if wanted not in ("auto", *names):
        raise UserError(f"--{flag} {wanted}: must be one of auto, {', '.join(names)}")
    there = [name for name in names if usable(name, device, dtype)]
    if wanted != "auto" and wanted not in there:
        raise UserError(
            f"--{flag} {wanted}: not installed, or not for {dtype} on {device.type}; usable here: {', '.join(there)}"
        )
    name = there[0] if wanted == "auto" else wanted
    _say(what, f"{device.type}, {str(dtype).removeprefix('torch.')}", name)
    return name


@functools.cache
def _say(what: str, where: str, name: str) -> None:
    log.info("%s (%s): %s", what, where, name)
