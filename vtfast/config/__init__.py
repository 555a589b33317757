"""The settings of a run, read from a YAML recipe and then from the command line. Start with `fields.py`, which lists
them all; `runs.py` puts them together as `Config` (GRPO) and `SFTConfig`, and `load.py` reads recipes, files and flags.

Names are TRL's where TRL has one. A recipe (`recipes/*.yaml`) maps these names to values; its `base:` names the recipe
that it differs from. Those called `*-sft` are for `vtfast sft`.
"""

from vtfast_kernels.loss_types import LOSS_TYPES

from vtfast.config.describe import field_defaults, field_help, field_names, field_sections
from vtfast.config.fields import FREEZABLE
from vtfast.config.load import RECIPES, load_config, recipe_names
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
