"""What was probably meant by a path or a name that is nowhere: a neighbour that is nearly called so, or a well-known
id of the hub that lost its owner. Looks at folders and at the lists below; asks nobody."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

ASSETS = Path(__file__).parents[1] / "model" / "assets"
SHIPPED = tuple(sorted(path.name for path in ASSETS.iterdir() if path.is_dir()))
MODELS = (
    *(f"Qwen/Qwen2-VL-{size}" for size in ("2B", "7B", "72B")),
    *(f"Qwen/Qwen2-VL-{size}-Instruct" for size in ("2B", "7B", "72B")),
    *(f"Qwen/Qwen2.5-VL-{size}-Instruct" for size in ("3B", "7B", "32B", "72B")),
    *(f"Qwen/Qwen2-{size}" for size in ("0.5B", "1.5B", "7B")),
    *(f"Qwen/Qwen2.5-{size}" for size in ("0.5B", "1.5B", "3B", "7B")),
    *(f"Qwen/Qwen2.5-{size}-Instruct" for size in ("0.5B", "1.5B", "3B", "7B")),
    *(f"Qwen/Qwen3-{size}" for size in ("0.6B", "1.7B", "4B", "8B")),
    *(f"Qwen/Qwen3-{size}-Base" for size in ("0.6B", "1.7B", "4B", "8B")),
)
"""Of the families that can be trained. Any other id of theirs works as well; these are the ones that are suggested."""
DATA = (
    "array/SAT",
    "array/SAT-v2",
    "leonardPKU/clevr_cogen_a_train",
    "leonardPKU/GEOQA_R1V_Train_8K",
    "lmms-lab/multimodal-open-r1-8k-verified",
)
"""Of the sets whose columns are recognised (`vtfast.data.columns`)."""


def did_you_mean(source: str | Path, otherwise: str, ids: Sequence[str] = (), bare: Sequence[str] = ()) -> str:
    """How the message about a `source` that is nowhere ends: `did you mean X?`, or `otherwise`. As `near`."""
    return question(near(source, ids, bare), otherwise)


def question(meant: str | None, otherwise: str) -> str:
    """`did you mean X?`, or `otherwise` where nothing seems to be meant."""
    return f"did you mean {meant}?" if meant else otherwise


def near(source: str | Path, ids: Sequence[str] = (), bare: Sequence[str] = ()) -> str | None:
    """What was probably meant, if anything was.

    Args:
        source: a path that does not exist, or a name that nothing has.
        ids: hub ids (owner/name) that may be meant; their names alone count, in any case.
        bare: names without an owner that may be meant, such as `synthetic`.
    """
    name = str(source)
    return near_id(name, ids, bare, cutoff=1.0) or near_path(source) or near_id(name, ids, bare)


def near_run(path: Path) -> str | None:
    """The run folder that `path` lies in, or the first one that lies in it; None where neither is one."""
    above = [path, *path.parents][:4]  # RUN/checkpoints/step-N/file
    try:
        below = sorted(path.iterdir())
    except OSError:  # no folder, or nobody may look into it
        below = []
    for folder in (*above, *below):
        if os.path.isfile(folder / "config.yaml"):  # False where Path.is_file raises: not ours to see
            return str(folder)
    return None


def near_path(path: str | Path) -> str | None:
    """The path with the first part that does not exist taken for the neighbour that is nearly called so; as much of it
    as exists then. None where no neighbour is near."""
    path = Path(path)
    try:
        whole = path.expanduser()
        parts = [whole, *whole.parents]
        missing = next(p for p in reversed(parts) if not p.exists())
        names = [entry.name for entry in missing.parent.iterdir()]
        close = difflib.get_close_matches(missing.name, names, n=1)
        if not close:
            return None
        there = missing.with_name(close[0])
        for part in whole.relative_to(missing).parts:
            if not (there / part).exists():
                break
            there = there / part
    except (OSError, ValueError, RuntimeError, StopIteration):  # no folder to look into, no path
        return None
    return str(there)


def near_id(name: str, ids: Sequence[str], bare: Sequence[str] = (), cutoff: float = 0.8) -> str | None:
    """The id whose name is `name` or nearly so: `Qwen2-VL-2B`, `qwen/qwen2-vl-2b`, `Qwen/Qwen2VL-2B`."""
    known = {one.lower(): one for one in bare}
    for one in ids:
        known.setdefault(one.split("/")[-1].lower(), one)
    said = name.rstrip("/").split("/")[-1].lower()
    close = difflib.get_close_matches(said, known, n=1, cutoff=cutoff)
    return known[close[0]] if close and known[close[0]] != name else None
