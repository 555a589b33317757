"""Every setting of a run: a dataclass, filled from a YAML recipe and then from the command line.

`Config` is GRPO's and `SFTConfig` that of supervised fine-tuning; both are put together from the sections below.
Names are TRL's where TRL has one. The text under a field is its help; `train.py --help` prints it. Recipes
(`recipes/*.yaml`) are data: a mapping of these names to values, and `base:` for the recipe that one differs from. Those
called `*-sft` are `vtfast sft`'s.
"""

from vtfast_kernels.loss_names import LOSS_TYPES

from vtfast.config.fields import FREEZABLE
from vtfast.config.load import (
    RECIPES,
    field_defaults,
    field_help,
    field_names,
    field_sections,
    load_config,
    recipe_names,
)
from vtfast.config.problems import SettingsError
from vtfast.config.runs import Config, RunConfig, SFTConfig

__all__ = [
    "FREEZABLE",
    "LOSS_TYPES",
    "RECIPES",
    "Config",
    "RunConfig",
    "SFTConfig",
    "SettingsError",
    "field_defaults",
    "field_help",
    "field_names",
    "field_sections",
    "load_config",
    "recipe_names",
]
