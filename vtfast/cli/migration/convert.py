"""Another trainer's settings -> vtfast's, with the outcome of each."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from vtfast.cli.migration.name_tables import COUNTED, DEFAULTS, EASYR1, FOLDED, TRL
from vtfast.cli.migration.parse_source import Source, read
from vtfast.config import Config, load_config
from vtfast.utils.errors import user_error

EPOCHS = ("num_train_epochs", "trainer.total_epochs", "trainer.total_episodes")
SYSTEMS = {"trl": "TRL", "r1-v": "R1-V / VisualThinker-R1-Zero", "easyr1": "EasyR1"}


@dataclass(frozen=True)
class Outcome:
    """The outcome of one setting of the other trainer."""

    name: str
    value: Any
    to: dict[str, Any]
    """Settings of vtfast; empty if it was dropped."""
    note: str = ""


@dataclass
class Migration:
    system: str
    settings: dict[str, Any] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """Decisions to make before a run, one line each."""

    def add(self, name: str, value: Any, to: Mapping[str, Any], note: str = "") -> None:
        self.settings |= to
        self.outcomes.append(Outcome(name, value, dict(to), note))

    def to_yaml(self) -> str:
        head = f"# From settings of {SYSTEMS[self.system]}.\n"
        head += "".join(f"# Warning: {warning}\n" for warning in self.warnings)
        return head + yaml.safe_dump(self.settings, sort_keys=False)


def migrate(what: str, system: str | None = None, rows: int | None = None) -> Migration:
    """Settings of vtfast for those in `what`: a YAML file, a shell script, or a launch line.

    `system`: trl, r1-v or easyr1; None guesses. `rows`: number of rows of the data set, to turn epochs into steps.
    Raises UserError for text without settings, and for settings that vtfast cannot run.
    """
    source = read(what)
    system = system or _guess(source)
    result = Migration(system)
    plain = {name: value for name, value in source.values.items() if name not in COUNTED}
    for name, value in DEFAULTS[system].items():
        if name not in COUNTED and name not in _settings_of(plain, system):
            result.add(name, value, {name: value}, "its default")
    for name, value in plain.items():
        result.add(name, value, *_apply_rule(name, value, system))
    _add_hard_coded(source, result)
    _count(source, system, rows, result)
    result.outcomes += [Outcome(word, "", {}, "not a setting") for word in source.unread]
    load_config(overrides={key: value for key, value in result.settings.items() if key != "output_dir"})
    return result


def _add_hard_coded(source: Source, result: Migration) -> None:
    """What the other trainers fix in their code."""
    if result.system == "trl":
        note = "TRL's data holds whole prompts; here --template renders a row's question"
        result.add("(prompts)", "", {}, note)
        correction = "vllm_importance_sampling_correction"
        if result.settings.get("use_vllm") and correction not in source.values:
            result.add(correction, True, {correction: True}, "its default with vLLM")
    elif result.system == "r1-v" and _is_visualthinker(source):
        fixed = {
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
        result.add("(VisualThinker)", "", fixed, note)
    elif result.system == "r1-v":
        fixed = {"template": "r1-v", "reward_mode": "recipe"}
        result.add("(R1-V)", "", fixed, "fixed in its code")


def _guess(source: Source) -> str:
    if any(name.startswith(("worker.", "algorithm.", "trainer.")) for name in source.values):
        return "easyr1"
    return "r1-v" if "open_r1" in source.script or _is_visualthinker(source) else "trl"


def _is_visualthinker(source: Source) -> bool:
    return str(source.values.get("dataset_name", "")) == "SAT"


def _settings_of(values: Mapping[str, Any], system: str) -> set[str]:
    return {to for name, value in values.items() for to in _apply_rule(name, value, system)[0]}


def _apply_rule(name: str, value: Any, system: str) -> tuple[dict[str, Any], str]:
    table = EASYR1 if system == "easyr1" else TRL
    rule = table.get(name)
    if rule is None:
        note = next((note for section, note in FOLDED.items() if name.startswith(section)), None)
        if note is None:
            close = difflib.get_close_matches(name, table, n=1, cutoff=0.8)
            note = "unknown here" + (f"; is {close[0]} meant?" if close else "")
        return {}, note
    if system == "r1-v" and name == "temperature":
        return {"temperature": 1.0}, "ignored there: its sampling is at 1, among the 50 likeliest tokens (--top_k 50)"
    if isinstance(rule, str):
        return ({}, "not set") if value is None else ({rule: value}, "")
    with user_error(f"{name}: {value!r} is not a valid value"):
        return rule(value)


def _count(source: Source, system: str, rows: int | None, result: Migration) -> None:
    """Batches, epochs and ranks: the others count completions or all GPUs, vtfast counts prompts per rank."""
    values = {name: value for name, value in source.values.items() if name in COUNTED}
    given = {**{k: v for k, v in DEFAULTS[system].items() if k in COUNTED}, **values}

    def number(name: str, default: float) -> float:
        value = given.get(name, default)
        with user_error(f"{name}: {value!r} is not a number"):
            return float(value)

    ranks = source.processes
    if system == "easyr1":
        ranks = int(number("trainer.n_gpus_per_node", 8) * number("trainer.nnodes", 1))
        prompts = number("worker.actor.global_batch_size", 128) / ranks
        note = "one update per rollout; EasyR1 makes rollout_batch_size / global_batch_size of them"
    else:
        batch, accumulation = (number(x, 1) for x in ("per_device_train_batch_size", "gradient_accumulation_steps"))
        G = result.settings.get("num_generations", 8)
        prompts = batch * accumulation / (G if system == "trl" else 1)
        note = "TRL counts completions, vtfast prompts" if system == "trl" else "prompts, as here"
    whole = max(1, math.ceil(prompts - 1e-9))
    if whole != prompts:
        note += f"; {prompts:g} prompts per rank rounded up"
    counts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": whole}
    names = [n for n in values if "batch" in n or "accumulation" in n or n == "steps_per_generation"]
    result.add(", ".join(names) or "(batch)", [values[n] for n in names], counts, note)
    if ranks:
        result.add("(ranks)", ranks, {"num_processes": ranks}, "another number runs with a warning")
    _count_steps(values, number, whole * (ranks or 1), rows, result)


def _count_steps(values: Mapping[str, Any], number, prompts: int, rows: int | None, result: Migration) -> None:
    name = next((n for n in EPOCHS if n in values), None)
    epochs = number(name or "num_train_epochs", 15 if result.system == "easyr1" else 3)
    if "max_steps" not in result.settings:
        if rows is None:
            result.add(name or "(epochs)", epochs, {}, "epochs need --rows, see the warning")
            result.warnings.append(_unknown_steps(epochs, prompts, result.settings.get("first_n")))
        else:
            steps = {"max_steps": _steps(epochs, rows, prompts)}
            note = f"{rows} rows, {prompts} prompts per step"
            result.add(name or "(epochs)", epochs, steps, note)
    elif name:
        result.add(name, epochs, {}, "max_steps is set")
    ratio = next((n for n in ("warmup_ratio", "worker.actor.optim.lr_warmup_ratio") if n in values), None)
    if ratio and "max_steps" in result.settings:
        steps = round(number(ratio, 0) * result.settings["max_steps"])
        result.add(ratio, values[ratio], {"warmup_steps": steps}, "of max_steps")
    elif ratio:
        note = "warmup_steps is this share of max_steps: needs --rows, see the warning"
        result.add(ratio, values[ratio], {}, note)


def _unknown_steps(epochs: float, prompts: int, first_n: int | None) -> str:
    rows = first_n or 10_000
    return (
        f"max_steps stays at the default of {Config().max_steps}, whatever the data. Give --rows ROWS, the number of"
        f" rows of the data set, and it becomes {epochs:g} epochs x ROWS / {prompts} prompts per step:"
        f" --rows {rows} makes it {_steps(epochs, rows, prompts)}"
    )


def _steps(epochs: float, rows: int, prompts: int) -> int:
    return math.ceil(epochs * rows / prompts - 1e-9)
