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
    """What a run says of its distance from the device's limits, every `roofline_steps` steps."""

    def __init__(self, config: Config, policy: Policy, ranks: Ranks) -> None:
        """Collective: rates may have to be measured."""
        self.config, self.ranks = config, ranks
        self.rates: Rates | None = None
        if config.roofline_steps:
            measure = config.roofline_rates == "measured"
            self.rates = device_rates(policy.head.dtype, ranks, measure)
        self.weights = ModelSize.of(policy)

    def metrics(
        self, step: int, groups: Sequence[Group], measured: Mapping[str, float | None]
    ) -> dict[str, float | None]:
        """Shares and rates of this step, for metrics.jsonl; nothing in the steps between. Collective.

        `measured`: the step's metrics so far, its times among them. The device is not waited for."""
        config, rates = self.config, self.rates
        if config.roofline_steps == 0 or step % config.roofline_steps:
            return {}
        known = {f"roofline/{name}": getattr(rates, name, None) for name in RATES}
        known["roofline/weight_bytes"] = self.weights.size
        if rates is None:  # no data sheet for this device
            return dict.fromkeys(shares({}, {"step": 1.0})) | known
        mine = [size_of(group, config.beta == 0) for group in groups]
        everyone = self.ranks.gather(mine)
        fresh = (step - 1) % config.num_iterations == 0
        floors = step_floors(self.weights, rates, config, everyone, fresh)
        seconds = phase_seconds(measured)
        if self.ranks.is_main:
            with logging_redirect_tqdm():  # above the progress bar, not behind it
                log.info("%s", line(step, floors, seconds))
        return shares(floors, seconds) | known


def line(step: int, floors: Mapping[str, Floor], seconds: Mapping[str, float]) -> str:
    """One line for the terminal."""
    share = {key.removeprefix("roofline/"): value for key, value in shares(floors, seconds).items()}
    said: list[str] = []
    for name in PHASES:
        if share[name] is None:
            continue
        text = f"{name} {share[name]:.0%}" + (" of its floor's speed" if not said else "")
        if name == "rollout" and share["decode"] is not None:
            text += f" (decode {share['decode']:.0%}, {floors['decode'].bound}-bound)"
        elif name != "score":
            text += f" ({floors[name].bound}-bound)"
        said.append(text)
    total = f"floor {_seconds(share['floor_seconds'])} of {_seconds(seconds['step'])}"
    return f"step {step} roofline: {', '.join(said)}; {total}"


def shares(floors: Mapping[str, Floor], seconds: Mapping[str, float]) -> dict[str, float | None]:
    """Floor / time of each phase and of the whole step, by the names of metrics.jsonl; None for a phase that did
    nothing or was not timed."""
    parts = (*PHASES, "prefill", "decode")
    found = {}
    for name in parts:
        floor, time = floors.get(name, Floor()).seconds, seconds.get(name)
        found[f"roofline/{name}"] = floor / time if floor and time else None
    floor = sum(floors[name].seconds for name in PHASES if name in floors)
    return found | {"roofline/floor_seconds": floor, "roofline/step": floor / seconds["step"]}


def phase_seconds(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Measured times by phase, from a line of metrics.jsonl."""
    names = {name: f"time/{name}" for name in (*PHASES, "step")}
    names |= {name: f"rollout/{name}_seconds" for name in ("prefill", "decode")}
    return {name: metrics[key] for name, key in names.items() if metrics.get(key) is not None}


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 1 else f"{value * 1e3:.3g} ms"
