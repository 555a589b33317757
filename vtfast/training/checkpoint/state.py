"""`resume/state.json`: everything of a checkpoint that is no tensor."""

from __future__ import annotations

import functools
import json
import subprocess
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import UnionType
from typing import Any, get_type_hints

from vtfast.model.fingerprint import _values_of
from vtfast.training.checkpoint.checksums import STATE
from vtfast.utils.errors import UserError

COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
FORMAT = 1
"""Of the folder `resume`. A reader that does not know the number does not guess."""


@dataclass(frozen=True)
class State:
    """What a run was when it was saved. All values are JSON's."""

    step: int
    """Optimizer steps done."""
    method: str
    """GRPO or SFT."""
    ranks: int
    prompts_per_step: int
    """Over all ranks."""
    samples: int
    """Training samples, of which `questions.order` makes the order."""
    samples_digest: str
    base: str
    """Fingerprint of the weights that training began with: those of `--model`."""
    schedule: dict[str, Any]
    """`state_dict` of the learning-rate schedule."""
    optimizer: list[dict[str, float]]
    """For each parameter group the optimizer state that is one number, such as Adam's `step`."""
    counters: dict[str, int]
    """DeepSpeed's own counts of steps and samples."""
    before: dict[str, Any] | None = None
    """Held-out result from before training (the fields of HeldOutScores)."""
    trackers: dict[str, str] = field(default_factory=dict)
    """Ids of the run at Weights & Biases and the like, by tracker."""
    carried: dict[str, Any] = field(default_factory=dict)
    """What the kind of training carries from step to step (`Run.carried`)."""
    code: dict[str, str | None] = field(default_factory=dict)
    """Versions of vtfast, its commit, and the libraries."""
    format: int = FORMAT

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def read_state(folder: Path) -> State:
    """Of a checkpoint folder. Raises UserError for one that this version cannot read."""
    path = folder / STATE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be an object")
    if values.get("format") != FORMAT:
        raise UserError(f"{path}: has format {values.get('format')} and this version of vtfast reads {FORMAT}")
    hints = get_type_hints(State)
    for name in hints:
        if name not in values:
            raise UserError(f"{path}: lacks {name}")
        kind = getattr(hints[name], "__origin__", hints[name])
        if isinstance(kind, UnionType):
            kind = dict if values[name] is not None else type(None)
        if isinstance(kind, type) and not isinstance(values[name], kind):
            raise UserError(f"{path}: {name} must be {kind.__name__}")
    numbers = {
        "schedule": [values["schedule"].get(key) for key in ("last_epoch", "_step_count")],
        "counters": [values["counters"].get(key) for key in COUNTERS],
        "step": [values["step"]],
        "optimizer": [x for part in values["optimizer"] for x in _values_of(part)],
    }
    for name, found in numbers.items():
        if not all(type(number) in (int, float) and number >= 0 for number in found):
            raise UserError(f"{path}: {name} lacks a number, or holds something else")
    if values["before"] is not None and set(values["before"]) != {"scores", "count"}:
        raise UserError(f"{path}: before must have scores and count")
    return State(**{entry.name: values[entry.name] for entry in fields(State)})


@functools.cache
def code_versions() -> dict[str, str | None]:
    """Of vtfast (with its commit, if it runs from a repository) and of what its numbers depend on."""
    versions: dict[str, str | None] = {}
    for name in ("vtfast", "torch", "transformers", "deepspeed", "safetensors"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    root = Path(__file__).parents[3]
    versions["commit"] = _commit(root) if (root / ".git").exists() else None
    return versions


def _commit(root: Path) -> str | None:
    """`-dirty` behind it says that files had been changed since."""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):  # no git here: then nobody knows
        return None
    return done.stdout.strip() or None
