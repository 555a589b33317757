"""ZeRO-2's share of a rank, weight by weight: fp32 masters and AdamW's moments, written by name and place.

ZeRO lays all trained weights behind each other and gives every rank a stretch of that. Where a weight's piece lies in
the rank's stretch is in `param._hp_mapping`, which DeepSpeed's universal checkpoints are made of, too. A file that
names weights and places does not depend on the number of ranks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vtfast.utils.errors import UserError

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
    """Views of the piece [values], fp32, by what they hold: `fp32`, `exp_avg`, `exp_avg_sq`."""

    @property
    def stop(self) -> int:
        return self.start + len(self.tensors[MASTER])


def fragments(module: nn.Module, zero: Any) -> Iterator[Fragment]:
    """`zero`: `engine.optimizer` of DeepSpeed. Weights that are frozen, or other ranks' business, have no fragment."""
    for name, weight in module.named_parameters():
        mapping = getattr(weight, "_hp_mapping", None)
        if mapping is None:
            continue
        flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
        state = zero.optimizer.state.get(flat, {})
        whole = {MASTER: flat.detach()} | {key: value for key, value in state.items() if _is_moment(value, flat)}
        place = mapping.get_hp_fragment_address()
        tensors = {key: value.narrow(0, place.start, place.numel) for key, value in whole.items()}
        yield Fragment(name, tuple(weight.shape), mapping.lp_fragment_address.start, tensors)


def scalars(zero: Any) -> list[dict[str, float]]:
    """For each parameter group the state that is one number: AdamW's `step`. Empty before the first step."""
    return [
        {key: float(value) for key, value in zero.optimizer.state.get(flat, {}).items() if not _is_moment(value, flat)}
        for flat in zero.single_partition_of_fp32_groups
    ]


def to_tensors(pieces: list[Fragment]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    tensors = {f"{key}/{p.name}": value for p in pieces for key, value in p.tensors.items()}
    places = {piece.name: {"start": piece.start, "shape": piece.shape} for piece in pieces}
    return tensors, {"places": json.dumps(places)}


@torch.no_grad()
def restore_optimizer(module: nn.Module, zero: Any, folder: Path, numbers: Sequence[Mapping[str, float]]) -> None:
    """Fill this rank's masters and moments from the files of all ranks that wrote `folder`, then the weights of all
    ranks from the masters. Collective. `numbers`: what `scalars` said.

    Raises UserError where the files do not hold exactly the weights that are trained here."""
    if len(numbers) != len(zero.single_partition_of_fp32_groups):
        raise UserError(f"{folder}: has {len(numbers)} groups of weights, and training has another number")
    with ExitStack() as stack:
        saved = _Saved(folder, stack)
        _make_state(zero, saved.keys, numbers)
        names = set()
        for piece in fragments(module, zero):
            names.add(piece.name)
            for key, into in piece.tensors.items():
                saved.read(key, piece, into)
    trained = {name for name, weight in module.named_parameters() if weight.requires_grad}
    if surplus := sorted(set(saved.shapes) - trained):
        raise UserError(
            f"{folder.parent}: {surplus[0]} was trained there and is not trained here; --freeze and --use_peft"
            " cannot change in a resumed run"
        )
    zero.update_lp_params()


def _make_state(zero: Any, keys: set[str], numbers: Sequence[Mapping[str, float]]) -> None:
    """The state that AdamW would make at its first step, in its own types, to be filled."""
    for flat, values in zip(zero.single_partition_of_fp32_groups, numbers, strict=True):
        moments = {key: torch.zeros_like(flat) for key in keys - {MASTER}}
        if moments or values:
            steps = {key: torch.tensor(x, device=flat.device) for key, x in values.items()}
            zero.optimizer.state[flat] = steps | moments


def _is_moment(value: Any, flat: Tensor) -> bool:
    return torch.is_tensor(value) and value.shape == flat.shape


class _Saved:
    """The pieces in the files of all ranks."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.keys: set[str] = set()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.pieces: dict[str, list[tuple[int, Any]]] = {}
        """By weight: (first value, open file)."""
        for path in sorted(folder.glob("rank-*.safetensors")):
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
                places = json.loads((file.metadata() or {})["places"])
                for name, place in places.items():
                    self.shapes[name] = tuple(map(int, place["shape"]))
                    self.pieces.setdefault(name, []).append((int(place["start"]), file))
            except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
                raise UserError(f"{path}: is no part of an optimizer ({error!r})") from None
            self.keys |= {key.split("/")[0] for key in file.keys() if "/" in key}  # noqa: SIM118

    def read(self, key: str, piece: Fragment, into: Tensor) -> None:
        """`into` [values] := `key` of the piece, from whichever files hold parts of it."""
        where = f"{self.folder.parent}: {piece.name}"
        if self.shapes.get(piece.name) != piece.shape:
            raise UserError(
                f"{where}: is {self.shapes.get(piece.name, 'not trained')} there and {piece.shape} here;"
                " --model, --freeze and --use_peft cannot change in a resumed run"
            )
        found = 0
        for start, file in self.pieces[piece.name]:
            try:
                source = file.get_slice(f"{key}/{piece.name}")
            except SafetensorError as error:
                raise UserError(f"{where}: {error}") from None
            first, last = max(piece.start, start), min(piece.stop, start + source.get_shape()[0])
            if first < last:
                into[first - piece.start : last - piece.start] = source[first - start : last - start].to(into.device)
                found += last - first
        if found != len(into):
            raise UserError(f"{where}: {key} has {found} of {len(into)} values")
