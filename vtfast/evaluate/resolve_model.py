"""Resolves `vtfast eval --model`: a checkpoint of a run with the run's settings, or another model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vtfast.data.prompt_templates import load_template
from vtfast.model.folder_checks import check_folder
from vtfast.model.loading import read_model_config
from vtfast.utils.did_you_mean import near_run, question
from vtfast.utils.errors import UserError
from vtfast.utils.files import expand, step_of
from vtfast.utils.hub import ASSETS
from vtfast.utils.yaml_file import read_yaml


@dataclass(frozen=True)
class EvaluatedModel:
    path: str
    """Folder or hub id, for `load_model`."""
    name: str
    """Name of its folder in `evaluations/`."""
    output_root: Path
    """Folder that holds `evaluations/`: the run's, or the current one."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the run; empty for a model from elsewhere."""

    @property
    def step(self) -> int | None:
        return step_of(self.name) if self.config else None


def find_model(model: str) -> EvaluatedModel:
    """The model that a path, a run folder or a hub id refers to. It need not exist (`--rescore`).

    `RUN` and `RUN/checkpoints/last` are the newest step; a name in vtfast/model/assets is a model that vtfast ships.

    Raises:
        UserError: a run without checkpoints, or whose config.yaml cannot be read.
    """
    path = expand(model)
    if not path.exists() and (ASSETS / model).is_dir():
        return EvaluatedModel(str(ASSETS / model), model, Path())
    if (path / "config.yaml").is_file() and (path / "checkpoints").is_dir():
        path = path / "checkpoints" / "last"
    if path.name == "last" and path.parent.name == "checkpoints":
        path = path.resolve() if path.exists() else _newest(path.parent)
    run = path.parent.parent
    if path.parent.name == "checkpoints" and (run / "config.yaml").is_file():
        return EvaluatedModel(str(path), path.name, run, _read_config(run / "config.yaml"))
    return EvaluatedModel(str(path) if path.exists() else model, path.absolute().name, Path())


def check_model(model: EvaluatedModel) -> None:
    """Raises UserError unless it is a model of a known family. Looks at file names and config.json only."""
    folder = Path(model.path)
    if folder.is_dir() and not _is_model(folder):
        if (folder / "config.yaml").is_file():
            problem = "is a run that has saved no checkpoint yet; name another"
        else:
            meant = question(near_run(folder), "name another")
            problem = f"is neither a run folder (it has no config.yaml) nor a model folder (no config.json); {meant}"
        raise UserError(f"--model {folder}: {problem}")
    if folder.is_dir():
        check_folder(folder)
    read_model_config(model.path)


def _newest(folder: Path) -> Path:
    steps = {
        step: path for path in folder.glob("step-*") if (step := step_of(path.name)) is not None and _is_model(path)
    }
    if not steps:
        raise UserError(f"--model {folder / 'last'}: there is no checkpoint (step-N) in {folder}")
    return steps[max(steps)]


def _is_model(path: Path) -> bool:
    return (path / "config.json").is_file() or (path / "adapter_config.json").is_file()


def _read_config(path: Path) -> dict[str, Any]:
    """The settings of a run, which may be another person's. Checks the types of those that an evaluation uses."""
    values = read_yaml(path)
    types = {"template": str, "literal_image": bool, "min_pixels": int, "max_pixels": int}
    wrong = [name for name, expected in types.items() if type(values.get(name)) not in (expected, type(None))]
    if wrong or not values:
        reason = f"wrong type of {', '.join(wrong)}" if wrong else "empty"
        raise UserError(f"{path}: is not a run's config.yaml ({reason})")
    return values


def default_template(model: EvaluatedModel, chat_template: str | Mapping[str, str] | None) -> str:
    """Name of the evaluation template that fits how a model was trained.

    For a run's checkpoint, the run's template decides: chat tokens or not, `<think>` or not. For another model, the
    tokenizer's chat template distinguishes an instruction-tuned model from a base model, and it is asked to reason.
    """
    trained_with = model.config.get("template")
    if trained_with is not None:
        text = load_template(trained_with)
        reasons = "<think>" in text
    else:
        if isinstance(chat_template, Mapping):  # a tokenizer may have several, by name
            chat_template = chat_template.get("default")
        text, reasons = chat_template or "", True
    name = "eval-instruct" if "<|im_start|>" in text else "eval-r1-zero"
    return name if reasons else f"{name}-direct"
