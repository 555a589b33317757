"""Going on from a checkpoint: what must be the same, what is only said, and everything put back in its place."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from safetensors import safe_open

from vtfast.evaluate.held_out import HeldOut
from vtfast.training.checkpoint.checksums import SETTINGS, STATE
from vtfast.training.checkpoint.find import Checkpoint
from vtfast.training.checkpoint.optimizer import restore, scalars
from vtfast.training.checkpoint.rng import set_rng_state
from vtfast.training.checkpoint.run_folder import settings
from vtfast.training.checkpoint.state import COUNTERS, State, code_versions
from vtfast.utils.errors import UserError

if TYPE_CHECKING:
    from vtfast.training.loop import Run

log = logging.getLogger("vtfast")
LASTING = ("freeze", "use_peft", "lora_r", "lora_alpha", "lora_target_modules")
"""Settings that decide which weights are trained."""
ORDER = (
    "seed",
    "data",
    "split",
    "first_n",
    "first_rows",
    "static",
    "question_types",
    "max_prompt_length",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_iterations",
)
"""Settings that decide which question is asked at which step."""
PLACE = ("output_dir", "resume_from_checkpoint", "recipe")
"""Settings that say nothing of how a run trains."""
T = TypeVar("T")


def put_back(run: Run, checkpoint: Checkpoint) -> None:
    """Weights, optimizer, schedule and random numbers as they were. The run is built already, from `--model`: the KL's
    reference is what training began with. Collective.

    Raises UserError where the run cannot be the same one."""
    state, engine = checkpoint.state, run.engine
    _compare(run, checkpoint)
    files = checkpoint.folder / "resume"
    restore(run.policy.module, engine.optimizer, files, state.optimizer)
    schedule = engine.lr_scheduler
    # The rates themselves are computed anew: the learning rate may be another from now on.
    position = {key: state.schedule[key] for key in ("last_epoch", "_step_count")}
    schedule.load_state_dict(schedule.state_dict() | position)
    for group, base, rate in zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = base * rate(schedule.last_epoch)
    for name in COUNTERS:
        setattr(engine, name, state.counters[name])
    own = files / f"rank-{run.ranks.rank}.safetensors"
    try:
        run.carry(state.carried)
        if own.is_file():  # not if there are more ranks than there were
            with safe_open(own, framework="pt") as file:
                names = [name for name in file.keys() if name.startswith("random.")]  # noqa: SIM118
                set_rng_state({name: file.get_tensor(name) for name in names})
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{checkpoint.folder}: what it carries is not this version's ({error!r}); name another one"
        ) from error


def state_of(run: Run, step: int) -> State:
    """The run after `step` steps, as far as it is no tensor."""
    engine = run.engine
    return State(
        step=step,
        method=run.method,
        ranks=run.ranks.size,
        prompts_per_step=run.prompts_per_step,
        samples=len(run.train_samples),
        samples_digest=run.samples_digest,
        base=run.base,
        schedule=engine.lr_scheduler.state_dict(),
        optimizer=scalars(engine.optimizer),
        counters={name: int(getattr(engine, name)) for name in COUNTERS},
        before=asdict(run.before) if run.before else None,
        trackers=run.tracker.ids if run.tracker else {},
        carried=run.carried(),
        code=code_versions(),
    )


def held_out_before(state: State) -> HeldOut | None:
    return HeldOut(**state.before) if state.before else None


def write_rest(run: Run, state: State, folder: Path, weights: dict[str, Any]) -> None:
    """All of a checkpoint that is no rank's own."""
    run.policy.module.save_pretrained(folder, state_dict=weights)
    run.processor.save_pretrained(folder)
    (folder / SETTINGS).write_text(settings(run.config), encoding="utf-8")
    (folder / STATE).write_text(state.to_json(), encoding="utf-8")


def _compare(run: Run, checkpoint: Checkpoint) -> None:
    """Say in the log how the settings differ from the checkpoint's; raise UserError where they must not."""
    state, where = checkpoint.state, checkpoint.folder
    if state.method != run.method:
        raise UserError(
            f"{where}: is of a run of {state.method}, and this is one of {run.method}; its weights"
            " start a new run with --model"
        )
    if state.base != run.base:
        raise UserError(
            f"--model {run.config.model}: is not the model that the run of {where} began with; resuming needs it"
            " (its weights are what the KL and frozen parts go by)"
        )
    saved = yaml.safe_load((where / SETTINGS).read_text(encoding="utf-8"))
    changed = dict(_differences(saved, asdict(run.config)))
    for name in LASTING:
        if name in changed and not (name.startswith("lora_") and not run.config.use_peft):
            raise UserError(
                f"--{name} {changed[name][1]}: was {changed[name][0]} when the run of {where} began, and cannot change"
            )
    for name, (before, now) in changed.items():
        say = log.warning if name in ORDER else log.info
        note = "; from here on other questions are asked than would have been" if name in ORDER else ""
        say("--%s: %s, was %s in %s%s", name, now, before, where.name, note)
    if state.samples_digest != run.samples_digest:
        log.warning(
            "%s: the training samples are others than those of %s (%d, were %d)",
            run.config.data,
            where.name,
            len(run.train_samples),
            state.samples,
        )
    if state.prompts_per_step != run.prompts_per_step:
        log.warning(
            "%d prompts a step on %d rank(s), were %d on %d in %s; from here on other questions are asked than would"
            " have been",
            run.prompts_per_step,
            run.ranks.size,
            state.prompts_per_step,
            state.ranks,
            where.name,
        )


def _differences(saved: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, tuple]]:
    for name, value in now.items():
        if name not in PLACE and name in saved and saved[name] != value:
            yield name, (saved[name], value)
