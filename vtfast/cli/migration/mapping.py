"""Another trainer's settings -> ours, with a line on the fate of each."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from vtfast.cli.migration.reading import Source, read
from vtfast.cli.migration.rules import COUNTED, DEFAULTS, EASYR1, FOLDED, TRL, Drop
from vtfast.config import Config, load_config
from vtfast.utils.errors import UserError

EPOCHS = ("num_train_epochs", "trainer.total_epochs", "trainer.total_episodes")
SYSTEMS = {"trl": "TRL", "r1-v": "R1-V / VisualThinker-R1-Zero", "easyr1": "EasyR1"}


@dataclass(frozen=True)
class Fate:
    """What became of one setting."""

    name: str
    value: Any
    to: dict[str, Any]
    """Ours; empty where it was dropped."""
    note: str = ""


@dataclass
class Migration:
    system: str
    settings: dict[str, Any] = field(default_factory=dict)
    fates: list[Fate] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """What has to be decided before a run: a line each, which says how."""

    def take(self, name: str, value: Any, to: Mapping[str, Any], note: str = "") -> None:
        self.settings |= to
        self.fates.append(Fate(name, value, dict(to), note))

    def to_yaml(self) -> str:
        head = f"# From settings of {SYSTEMS[self.system]}.\n"
        head += "".join(f"# Warning: {warning}\n" for warning in self.warnings)
        return head + yaml.safe_dump(self.settings, sort_keys=False)


def migrate(what: str, system: str | None = None, rows: int | None = None) -> Migration:
    """Settings of this trainer for those in `what`: a YAML file, a shell script, or a launch line.

    `system`: trl, r1-v or easyr1; None guesses. `rows`: of the data set, which turns epochs into steps.

    Raises UserError where nothing can be read, and where the settings found make no run.
    """
    source = read(what)
    system = system or _guess(source)
    if system not in SYSTEMS:
        raise UserError(f"--from {system}: must be one of {', '.join(SYSTEMS)}")
    result = Migration(system)
    plain = {name: value for name, value in source.values.items() if name not in COUNTED}
    for name, value in DEFAULTS[system].items():
        if name not in COUNTED and name not in _targets(plain, system):
            result.take(name, value, {name: value}, "its default")
    for name, value in plain.items():
        result.take(name, value, *_fate(name, value, system))
    _take_what_code_says(source, result)
    _count(source, system, rows, result)
    result.fates += [Fate(word, "", {}, "not a setting") for word in source.unread]
    load_config(overrides={key: value for key, value in result.settings.items() if key != "output_dir"})
    return result


def _take_what_code_says(source: Source, result: Migration) -> None:
    """What the others do not have as settings."""
    if result.system == "trl":
        asked = "TRL's data holds whole prompts; here --template asks a row's question"
        result.take("(prompts)", "", {}, asked)
        correction = "vllm_importance_sampling_correction"
        if result.settings.get("use_vllm") and correction not in source.values:
            result.take(correction, True, {correction: True}, "its default with vLLM")
    elif result.system == "r1-v" and _is_visualthinker(source):
        same = {
            "template": "r1-zero",
            "literal_image": True,
            "reward_mode": "recipe",
            "static": True,
            "data": "array/SAT",
            "split": "train",
            "first_n": 15000,
            "first_rows": 15000,
        }
        note = "fixed in its code; --recipe visualthinker-2b-sat has all of it"
        result.take("(VisualThinker)", "", same, note)
    elif result.system == "r1-v":
        same = {"template": "r1-v", "reward_mode": "recipe"}
        result.take("(R1-V)", "", same, "fixed in its code")


def _guess(source: Source) -> str:
    if any(name.startswith(("worker.", "algorithm.", "trainer.")) for name in source.values):
        return "easyr1"
    return "r1-v" if "open_r1" in source.script or _is_visualthinker(source) else "trl"


def _is_visualthinker(source: Source) -> bool:
    return str(source.values.get("dataset_name", "")) == "SAT"


def _targets(values: Mapping[str, Any], system: str) -> set[str]:
    return {to for name, value in values.items() for to in _fate(name, value, system)[0]}


def _fate(name: str, value: Any, system: str) -> tuple[dict[str, Any], str]:
    table = EASYR1 if system == "easyr1" else TRL
    rule = table.get(name)
    if rule is None:
        note = next((note for section, note in FOLDED.items() if name.startswith(section)), None)
        if note is None:
            close = difflib.get_close_matches(name, table, n=1, cutoff=0.8)
            note = "unknown here" + (f"; is {close[0]} meant?" if close else "")
        return {}, note
    if isinstance(rule, Drop):
        return {}, rule.reason
    if system == "r1-v" and name == "temperature":
        return {"temperature": 1.0}, "ignored there: its sampling is at 1, among the 50 likeliest tokens (--top_k 50)"
    if isinstance(rule, str):
        return ({}, "not set") if value is None else ({rule: value}, "")
    try:
        return rule(value)
    except (TypeError, ValueError):
        raise UserError(f"{name}: {value!r} is no value for it") from None


def _count(source: Source, system: str, rows: int | None, result: Migration) -> None:
    """Batches, epochs and ranks: what the others count in completions or over all GPUs, we count in prompts a rank."""
    values = {name: value for name, value in source.values.items() if name in COUNTED}
    given = {**{k: v for k, v in DEFAULTS[system].items() if k in COUNTED}, **values}

    def number(name: str, default: float) -> float:
        try:
            return float(given.get(name, default))
        except (TypeError, ValueError):
            raise UserError(f"{name}: {given[name]!r} is not a number") from None

    ranks = source.processes
    if system == "easyr1":
        ranks = int(number("trainer.n_gpus_per_node", 8) * number("trainer.nnodes", 1))
        prompts = number("worker.actor.global_batch_size", 128) / ranks
        note = "one update a rollout; EasyR1 makes rollout_batch_size / global_batch_size of them on older answers"
    else:
        batch, passes = (number(x, 1) for x in ("per_device_train_batch_size", "gradient_accumulation_steps"))
        G = result.settings.get("num_generations", 8)
        prompts = batch * passes / (G if system == "trl" else 1)
        note = "TRL counts completions, this trainer prompts" if system == "trl" else "prompts, as here"
    whole = max(1, math.ceil(prompts - 1e-9))
    if whole != prompts:
        note += f"; {prompts:g} prompts a rank rounded up"
    counts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": whole}
    names = [n for n in values if "batch" in n or "accumulation" in n or n == "steps_per_generation"]
    result.take(", ".join(names) or "(batch)", [values[n] for n in names], counts, note)
    if ranks:
        result.take("(ranks)", ranks, {"num_processes": ranks}, "a warning tells when others are used")
    _count_steps(values, number, whole * (ranks or 1), rows, result)


def _count_steps(values: Mapping[str, Any], number, prompts: int, rows: int | None, result: Migration) -> None:
    name = next((n for n in EPOCHS if n in values), None)
    epochs = number(name or "num_train_epochs", 15 if result.system == "easyr1" else 3)
    if "max_steps" not in result.settings:
        if rows is None:
            result.take(name or "(epochs)", epochs, {}, "epochs need --rows, see the warning")
            result.warnings.append(_unknown_steps(epochs, prompts, result.settings.get("first_n")))
        else:
            steps = {"max_steps": _steps(epochs, rows, prompts)}
            note = f"{rows} rows, {prompts} prompts a step"
            result.take(name or "(epochs)", epochs, steps, note)
    elif name:
        result.take(name, epochs, {}, "max_steps decides")
    ratio = next((n for n in ("warmup_ratio", "worker.actor.optim.lr_warmup_ratio") if n in values), None)
    if ratio and "max_steps" in result.settings:
        steps = round(number(ratio, 0) * result.settings["max_steps"])
        result.take(ratio, values[ratio], {"warmup_steps": steps}, "of max_steps")
    elif ratio:
        note = "warmup_steps is this share of max_steps: needs --rows, see the warning"
        result.take(ratio, values[ratio], {}, note)


def _unknown_steps(epochs: float, prompts: int, first_n: int | None) -> str:
    rows = first_n or 10_000
    return (
        f"max_steps stays at the default of {Config().max_steps}, whatever the data. Give --rows ROWS, the rows of the"
        f" data set, and it becomes {epochs:g} epochs x ROWS / {prompts} prompts a step:"
        f" --rows {rows} makes it {_steps(epochs, rows, prompts)}"
    )


def _steps(epochs: float, rows: int, prompts: int) -> int:
    return math.ceil(epochs * rows / prompts - 1e-9)
