"""Resuming from a checkpoint: what must be the same, what is only logged, and what is restored."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from vtfast.config import RunConfig, SettingsError
from vtfast.distributed.ranks import Ranks
from vtfast.model.policy import Policy
from vtfast.training.checkpoint.checksums import SETTINGS
from vtfast.training.checkpoint.find import Checkpoint
from vtfast.training.checkpoint.optimizer import restore_optimizer
from vtfast.training.checkpoint.rng import set_rng_state
from vtfast.training.checkpoint.state import State
from vtfast.training.health import Health
from vtfast.utils.errors import UserError
from vtfast.utils.yaml_file import read_yaml

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

log = logging.getLogger("vtfast")
FIXED_SETTINGS = ("freeze", "use_peft", "lora_r", "lora_alpha", "lora_target_modules")
"""Settings that decide which weights are trained; they cannot change."""
ORDER_SETTINGS = (
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
OTHER_ORDER = "; from now on the order of the samples differs from the saved run's"
IGNORED_SETTINGS = ("output_dir", "resume_from_checkpoint", "recipe")
"""Settings that do not change how a run trains."""


@dataclass(frozen=True)
class Identity:
    """What makes a run the same run before and after a resume."""

    method: str
    """GRPO or SFT."""
    base_fingerprint: str
    """Of the weights of `--model`, which training began with."""
    prompts_per_step: int
    """Over all ranks."""
    num_samples: int
    """Training samples."""
    samples_digest: str
    """Of the training samples."""


def restore(
    checkpoint: Checkpoint,
    config: RunConfig,
    ranks: Ranks,
    policy: Policy,
    engine: DeepSpeedEngine,
    identity: Identity,
    health: Health,
) -> None:
    """Load weights, optimizer, schedule, random number generators and counters from a checkpoint. Collective.

    The run is built from `--model` before: the KL's reference policy is the model that training began with.
    `identity`: of this run; compared with the checkpoint's.

    Raises UserError if this run cannot continue the checkpoint's."""
    state = checkpoint.state
    _check_continues(checkpoint, identity, config, ranks.size)
    files = checkpoint.folder / "resume"
    own = files / f"rank-{ranks.rank}.safetensors"
    try:
        restore_optimizer(policy.module, engine.optimizer, files, state.optimizer)
        _restore_schedule(engine, state)
        health.load_state_dict(state.carried["health"])
        if own.is_file():  # a rank that the saved run did not have starts with its own random numbers
            with safe_open(own, framework="pt") as file:
                names = [name for name in file.keys() if name.startswith("random.")]  # noqa: SIM118
                set_rng_state({name: file.get_tensor(name) for name in names})
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        raise UserError(
            f"{checkpoint.folder}: was written by another version of vtfast; name another one ({error!r})"
        ) from error


def _restore_schedule(engine: DeepSpeedEngine, state: State) -> None:
    """Put the learning-rate schedule and DeepSpeed's counters at the saved step.

    The rates are computed anew: the learning rate may have been changed for the rest of the run."""
    schedule = engine.lr_scheduler
    schedule.load_state_dict(schedule.state_dict() | state.schedule)
    for group, base, rate in zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = base * rate(schedule.last_epoch)
    for name, count in state.counters.items():
        setattr(engine, name, count)


def _check_continues(checkpoint: Checkpoint, identity: Identity, config: RunConfig, num_ranks: int) -> None:
    """Log how the settings differ from the checkpoint's; raise UserError if one differs that must not."""
    state, where = checkpoint.state, checkpoint.folder
    problems = []
    if state.method != identity.method:
        problems.append(
            f"{where}: is a checkpoint of {state.method}, and this run is {identity.method}; name it with --model to"
            " start a new run from its weights"
        )
    if state.base != identity.base_fingerprint:
        problems.append(
            f"--model {config.model}: is not the model that the run of {where} started from; resuming needs it (for the"
            " KL's reference policy and frozen weights)"
        )
    changed = dict(_differences(read_yaml(where / SETTINGS), config.model_dump()))
    for name in FIXED_SETTINGS:
        if name in changed and (config.use_peft or not name.startswith("lora_")):
            before, now = changed[name]
            problems.append(f"--{name} {now}: was {before} in the run of {where}, and cannot change")
    if problems:
        raise SettingsError(problems)
    for name, (before, now) in changed.items():
        level, note = (logging.WARNING, OTHER_ORDER) if name in ORDER_SETTINGS else (logging.INFO, "")
        log.log(level, "--%s: %s, was %s in %s%s", name, now, before, where.name, note)
    if state.samples_digest != identity.samples_digest:
        log.warning(
            "%s: the training samples differ from those of %s (%d, were %d)",
            config.data,
            where.name,
            identity.num_samples,
            state.samples,
        )
    if state.prompts_per_step != identity.prompts_per_step:
        log.warning(
            "%d prompts a step on %d rank(s), were %d on %d in %s%s",
            identity.prompts_per_step,
            num_ranks,
            state.prompts_per_step,
            state.ranks,
            where.name,
            OTHER_ORDER,
        )


def _differences(saved: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """(name, (saved value, value of this run)) of every setting that differs."""
    for name, value in now.items():
        if name not in IGNORED_SETTINGS and name in saved and saved[name] != value:
            yield name, (saved[name], value)
