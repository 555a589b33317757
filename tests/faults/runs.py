"""The runs that are killed: tiny; together they cover all state that a checkpoint must hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

STEPS = 12
COMMON = {
    "model": "tiny-spatial-base",
    "template": "brief",
    "eval_data": "none",
    "reward_funcs": "tests.faults.rewards:variety,format",
    "reward_workers": 1,
    "num_generations": 4,
    "max_completion_length": 12,
    "learning_rate": 1e-3,
    "warmup_steps": 4,
    "max_steps": STEPS,
    "cpu_threads": 1,
    "resume_from_checkpoint": "last",
}
"""A schedule that warms up and falls, so that a step at the wrong learning rate shows."""


@dataclass(frozen=True)
class Settings:
    """A command, and the settings that decide what may be missing after a kill."""

    name: str
    ranks: int
    own: dict[str, str | int | float]
    """Flags in addition to COMMON."""

    @property
    def limit(self) -> int | None:
        """`save_total_limit`."""
        return self.own.get("save_total_limit")

    def flags(self, data: Path, output_dir: Path) -> list[str]:
        """Those of `vtfast train`; the same at every start, as a scheduler's job script has them."""
        paths = {"data": data, "output_dir": output_dir}
        settings = COMMON | {"per_device_train_batch_size": 4 // self.ranks} | self.own | paths
        return [part for key, value in settings.items() for part in (f"--{key}", str(value))]


SETTINGS = (
    Settings("plain", 1, {"save_steps": 2, "save_total_limit": 2}),
    Settings("kl-async", 1, {"save_steps": 4, "num_iterations": 2, "beta": 0.04, "async_save": "true"}),
    Settings("ranks-kl", 2, {"save_steps": 3, "save_total_limit": 2, "beta": 0.04}),
    Settings("ranks-async", 2, {"save_steps": 2, "save_total_limit": 3, "async_save": "true"}),
)
