"""`resume/state.json`: everything in a checkpoint that is not a tensor."""

from __future__ import annotations

import contextlib
import functools
import json
import subprocess
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from vtfast.evaluate.held_out import HeldOutScores
from vtfast.training.checkpoint.checksums import STATE
from vtfast.utils.errors import UserError

FORMAT: Literal[1] = 1
"""Version of the folder `resume`. A reader refuses every other one."""
Count = Annotated[int, Field(ge=0)]
Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Schedule(TypedDict):
    """What is read of the `state_dict` of the learning-rate schedule; the file holds all of it."""

    last_epoch: Count
    _step_count: Count


class Counters(TypedDict):
    """DeepSpeed's own counts of steps and samples: attributes of its engine."""

    global_steps: Count
    global_samples: Count
    micro_steps: Count
    skipped_steps: Count


@dataclass(frozen=True, kw_only=True)
class State:
    """A run at the time it was saved. All values are JSON values."""

    step: Count
    """Optimizer steps done."""
    method: str
    """GRPO or SFT."""
    ranks: int
    prompts_per_step: int
    """Over all ranks."""
    samples: int
    """Number of training samples."""
    samples_digest: str
    base: str
    """Fingerprint of the weights that training started from: those of `--model`."""
    schedule: Schedule
    optimizer: list[dict[str, Number]]
    """For each parameter group the optimizer state that is one number, such as Adam's `step`."""
    counters: Counters
    before: HeldOutScores | None
    """Held-out result from before training."""
    trackers: dict[str, str]
    """Ids of the run at Weights & Biases and the like, by tracker."""
    carried: dict[str, Any]
    """Counters of the run: `state_dict` of its Health, under "health"."""
    code: dict[str, str | None]
    """Versions of vtfast, its commit, and the libraries."""
    format: Literal[1]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def read_state(folder: Path) -> State:
    """The state of a checkpoint folder. Raises UserError if this version cannot read it."""
    try:
        return TypeAdapter(State).validate_json((folder / STATE).read_bytes(), strict=True)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
        raise UserError(f"{folder / STATE}: this version of vtfast cannot read it ({'; '.join(problems)})") from None


@functools.cache
def code_versions() -> dict[str, str | None]:
    """Versions of vtfast (with its commit, if it runs from a repository) and of the libraries that compute."""
    versions: dict[str, str | None] = dict.fromkeys(("vtfast", "torch", "transformers", "deepspeed", "safetensors"))
    for name in versions:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    root = Path(__file__).parents[3]
    versions["commit"] = _commit(root) if (root / ".git").exists() else None
    return versions


def _commit(root: Path) -> str | None:
    """The commit of a repository, with `-dirty` appended if files have been changed since."""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip() or None
    return None
