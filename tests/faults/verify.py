"""Checks: whole checkpoints stay whole, the end equals the uninterrupted run's bit for bit, no process is left over.

Reads files only, and asks vtfast nothing: a checkpoint is whole here if its checksums say so.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from vtfast.report.tracking import MEASURED

from .damage import CHECKSUMS

MUST_EQUAL = ("completions.jsonl", "skipped.jsonl", "held_out.json")


def checkpoints(folder: Path) -> dict[int, Path]:
    """The folders of a run that are named like a checkpoint, by step."""
    found = (folder / "checkpoints").glob("step-*")
    return {int(path.name.removeprefix("step-")): path for path in sorted(found)}


def problem(checkpoint: Path) -> str | None:
    """Why a checkpoint is not whole; None if it is."""
    try:
        listed = json.loads((checkpoint / CHECKSUMS).read_text())
        digests = {name: entry["sha256"] for name, entry in listed.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{CHECKSUMS}: {error}"
    for name, digest in digests.items():
        try:
            data = (checkpoint / name).read_bytes()
        except (OSError, ValueError) as error:
            return str(error)
        if hashlib.sha256(data).hexdigest() != digest:
            return f"{name}: its bytes are not those that were written"
    present = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    unlisted = present - set(digests) - {CHECKSUMS}
    return f"files without a checksum: {', '.join(sorted(unlisted))}" if unlisted else None


def loadable(checkpoint: Path) -> str | None:
    """Why transformers cannot load a checkpoint's weights and tokenizer; None if it can."""
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    try:
        Qwen2VLForConditionalGeneration.from_pretrained(checkpoint)
        AutoTokenizer.from_pretrained(checkpoint)
    except Exception as error:  # whatever it is, it is what a user would see
        return f"{type(error).__name__}: {error}"
    return None


def whole(folder: Path) -> list[int]:
    """Steps of a run's whole checkpoints, oldest first."""
    return sorted(step for step, path in checkpoints(folder).items() if problem(path) is None)


def metrics(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if not key.startswith(MEASURED)} for line in lines]


def tensors(checkpoint: Path) -> dict[str, str]:
    """file/name of every tensor of a checkpoint, the optimizer's too -> digest of its type, shape and bytes."""
    from safetensors import safe_open

    digests = {}
    for path in sorted(checkpoint.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                value = file.get_tensor(name)
                data = value.contiguous().reshape(-1).view(dtype=_bytes()).numpy().tobytes()
                what = f"{value.dtype} {tuple(value.shape)} ".encode()
                digests[f"{path.relative_to(checkpoint)}/{name}"] = hashlib.sha256(what + data).hexdigest()
    return digests


def differences(reference: Path, folder: Path, stops: Collection[int] = (), limit: int | None = None) -> Iterator[str]:
    """Differences between a finished run and the uninterrupted one; nothing if they are equal.

    `stops`: steps that it has saved beside the due ones, since it was asked to stop; `limit`: its save_total_limit."""
    expected, found = metrics(reference), metrics(folder)
    if len(expected) != len(found):
        yield f"metrics.jsonl has {len(found)} lines instead of {len(expected)}"
    for left, right in zip(expected, found, strict=False):
        for key in sorted(left.keys() | right.keys()):
            if left.get(key, "absent") != right.get(key, "absent"):
                yield (
                    f"metrics.jsonl, step {left['step']}: {key} is {right.get(key, 'absent')!r}"
                    f" instead of {left.get(key, 'absent')!r}"
                )
    for name in MUST_EQUAL:
        contents = [path.read_bytes() if path.exists() else None for path in (reference / name, folder / name)]
        if contents[0] != contents[1]:
            yield f"{name} differs"
    kept, there = checkpoints(reference), checkpoints(folder)
    steps = sorted({*kept, *stops})
    if limit:
        del steps[:-limit]
    if steps != sorted(there):
        yield f"checkpoints of steps {sorted(there)} instead of {steps}"
    for step in sorted(kept.keys() & there.keys()):
        left, right = tensors(kept[step]), tensors(there[step])
        different = [name for name in left.keys() | right.keys() if left.get(name) != right.get(name)]
        if different:
            yield f"step-{step}: {len(different)} of {len(left)} tensors differ, {min(different)} first"


def leftovers(folder: Path) -> list[str]:
    """Half-written files and folders left over in a run folder."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.name.startswith(".") or path.suffix in (".partial", ".tmp")
    )


def processes(mark: str, sessions: set[int], patience: float = 20.0) -> list[int]:
    """Ids of processes that belong to one of `sessions`, or were started with `mark` in their environment, and that
    have not noticed within `patience` seconds that whom they work for is gone."""
    until = time.monotonic() + patience
    while (found := _processes(mark, sessions)) and time.monotonic() < until:
        time.sleep(0.1)
    return found


def _processes(mark: str, sessions: set[int]) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            environment = (entry / "environ").read_bytes()
        except OSError:  # it has ended meanwhile, or is another user's
            continue
        if state != "Z" and (int(session) in sessions or mark.encode() in environment):
            found.append(int(entry.name))
    return found


def _bytes():
    import torch

    return torch.uint8
