"""How near each phase of a step comes to the device's limits, as metrics and as a line in the log."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from tqdm.contrib.logging import logging_redirect_tqdm

from vtfast.config import Config
from vtfast.cost.devices import Rates, device_rates
from vtfast.cost.roofline import PHASES, RATES, Floor, ModelSize, step_floors
from vtfast.distributed.ranks import Ranks
from vtfast.model.policy import Policy
from vtfast.training.groups import Group
from vtfast.training.load_balancing import size_of

log = logging.getLogger("vtfast")


class Roofline:
    """Compares a step's time with the least time on this device, every `roofline_steps` steps."""

    def __init__(self, config: Config, policy: Policy, ranks: Ranks) -> None:
        """Collective: the device's rates may have to be measured."""
        self.config, self.ranks = config, ranks
        self.rates: Rates | None = None
        if config.roofline_steps:
            self.rates = device_rates(policy.head.dtype, ranks, config.roofline_rates == "measured")
        self.weights = ModelSize.of(policy)

    def metrics(
        self, step: int, groups: Sequence[Group], metrics: Mapping[str, float | None]
    ) -> dict[str, float | None]:
        """Metrics of this step, and a line in the log; nothing in the steps between. Collective.

        `metrics`: of the step, with its times."""
        config, rates = self.config, self.rates
        if config.roofline_steps == 0 or step % config.roofline_steps:
            return {}
        known = {f"roofline/{name}": getattr(rates, name, None) for name in RATES}
        known["roofline/weight_bytes"] = self.weights.size
        if rates is None:  # no data sheet for this device
            return dict.fromkeys(shares({}, {"step": 1.0})) | known
        sizes = self.ranks.gather([size_of(group, config.beta == 0) for group in groups])
        has_rollout = (step - 1) % config.num_iterations == 0
        floors = step_floors(self.weights, rates, config, sizes, has_rollout)
        seconds = phase_seconds(metrics)
        if self.ranks.is_main:
            with logging_redirect_tqdm():  # above the progress bar
                log.info("%s", line(step, floors, seconds))
        return shares(floors, seconds) | known


def line(step: int, floors: Mapping[str, Floor], seconds: Mapping[str, float]) -> str:
    """One line for the terminal."""
    share = {key.removeprefix("roofline/"): value for key, value in shares(floors, seconds).items()}
    parts: list[str] = []
    for name in PHASES:
        if share[name] is None:
            continue
        text = f"{name} {share[name]:.0%}" + (" of its floor's speed" if not parts else "")
        if name == "rollout" and share["decode"] is not None:
            text += f" (decode {share['decode']:.0%}, {floors['decode'].bound}-bound)"
        elif name != "score":
            text += f" ({floors[name].bound}-bound)"
        parts.append(text)
    total = f"floor {_seconds(floor_seconds(floors))} of {_seconds(seconds['step'])}"
    return f"step {step} roofline: {', '.join(parts)}; {total}"


def floor_seconds(floors: Mapping[str, Floor]) -> float:
    """The least time of a step."""
    return sum(floors[name].seconds for name in PHASES if name in floors)


def shares(floors: Mapping[str, Floor], seconds: Mapping[str, float]) -> dict[str, float | None]:
    """Least time / time of each phase and of the whole step, by metric name; None for a phase that did nothing or was
    not timed."""
    result: dict[str, float | None] = {}
    for name in (*PHASES, "prefill", "decode"):
        floor, time = floors.get(name, Floor()).seconds, seconds.get(name)
        result[f"roofline/{name}"] = floor / time if floor and time else None
    total = floor_seconds(floors)
    return result | {"roofline/floor_seconds": total, "roofline/step": total / seconds["step"]}


def phase_seconds(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Measured times by phase, from a line of metrics.jsonl."""
    names = {name: f"time/{name}" for name in (*PHASES, "step")}
    names |= {name: f"rollout/{name}_seconds" for name in ("prefill", "decode")}
    times = {name: metrics.get(key) for name, key in names.items()}
    return {name: time for name, time in times.items() if time is not None}


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 1 else f"{value * 1e3:.3g} ms"
