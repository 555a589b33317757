"""A rank's partition of ZeRO-2, weight by weight: fp32 master weights and AdamW's moments, stored by name and offset.

ZeRO concatenates all trained weights and gives every rank one slice. `param._hp_mapping` says where a weight's piece
lies in the rank's slice; DeepSpeed's universal checkpoints are made of it, too. A file with names and offsets does not
depend on the number of ranks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

MASTER = "fp32"


@dataclass(frozen=True)
class Fragment:
    """The piece of a weight that this rank updates."""

    name: str
    shape: tuple[int, ...]
    """Of the whole weight."""
    start: int
    """First value of the piece in the flattened weight."""
    tensors: dict[str, Tensor]
    """Views of the piece [values], fp32, by content: `fp32` (master weights), `exp_avg`, `exp_avg_sq`."""

    @property
    def stop(self) -> int:
        return self.start + len(self.tensors[MASTER])


def fragments(module: nn.Module, zero: Any) -> Iterator[Fragment]:
    """The fragments of this rank; weights that are frozen or belong to other ranks have none.

    `zero`: `engine.optimizer` of DeepSpeed."""
    for name, weight in module.named_parameters():
        mapping = getattr(weight, "_hp_mapping", None)
        if mapping is None:
            continue
        flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
        state = zero.optimizer.state[flat]
        whole = {MASTER: flat.detach()} | {key: value for key, value in state.items() if _is_moment(value, flat)}
        address = mapping.get_hp_fragment_address()
        tensors = {key: value.narrow(0, address.start, address.numel) for key, value in whole.items()}
        yield Fragment(name, tuple(weight.shape), mapping.lp_fragment_address.start, tensors)


def scalars(zero: Any) -> list[dict[str, float]]:
    """For each parameter group the optimizer state that is one number: AdamW's `step`."""
    return [
        {key: float(value) for key, value in zero.optimizer.state[flat].items() if not _is_moment(value, flat)}
        for flat in zero.single_partition_of_fp32_groups
    ]


def to_tensors(pieces: list[Fragment]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    tensors = {f"{key}/{p.name}": value for p in pieces for key, value in p.tensors.items()}
    places = {piece.name: {"start": piece.start, "shape": piece.shape} for piece in pieces}
    return tensors, {"places": json.dumps(places)}


@torch.no_grad()
def restore_optimizer(module: nn.Module, zero: Any, folder: Path, numbers: Sequence[Mapping[str, float]]) -> None:
    """Restore this rank's master weights and moments from the files in `folder`, whatever number of ranks wrote them,
    then the model's weights from the master weights. Collective.

    Args:
        numbers: what `scalars` returned when the checkpoint was written.

    Raises ValueError and the like unless the files hold exactly the weights that are trained now."""
    with ExitStack() as stack:
        saved = _RankFiles(folder, stack)
        trained = {name: tuple(weight.shape) for name, weight in module.named_parameters() if weight.requires_grad}
        if different := sorted(dict(saved.shapes.items() ^ trained.items())):
            raise ValueError(f"{different[0]} is not the same weight in the checkpoint and in this run")
        for flat, values in zip(zero.single_partition_of_fp32_groups, numbers, strict=True):
            for key, value in values.items():
                zero.optimizer.state[flat][key].fill_(value)
        had_moments = any(numbers)  # not before the first step, once
        for piece in fragments(module, zero):
            for key, tensor in piece.tensors.items():
                if key == MASTER or had_moments:
                    saved.read(key, piece, tensor)
    zero.update_lp_params()


def _is_moment(value: Any, flat: Tensor) -> bool:
    return torch.is_tensor(value) and value.shape == flat.shape


class _RankFiles:
    """The files of all ranks, and which piece of which weight each holds."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.pieces: dict[str, list[tuple[int, Any]]] = {}
        """By weight: (first value, open file)."""
        for path in sorted(folder.glob("rank-*.safetensors")):
            file = stack.enter_context(safe_open(path, framework="pt"))
            for name, place in json.loads(file.metadata()["places"]).items():
                self.shapes[name] = tuple(place["shape"])
                self.pieces.setdefault(name, []).append((place["start"], file))

    def read(self, key: str, piece: Fragment, out: Tensor) -> None:
        """Copy `key` of the piece into `out` [values], from all files that hold parts of it."""
        num_read = 0
        for start, file in self.pieces[piece.name]:
            source = file.get_slice(f"{key}/{piece.name}")
            first, last = max(piece.start, start), min(piece.stop, start + source.get_shape()[0])
            if first < last:
                out[first - piece.start : last - piece.start] = source[first - start : last - start].to(out.device)
                num_read += last - first
        if num_read != len(out):
            raise ValueError(f"{key} of {piece.name} has {num_read} of {len(out)} values")
