"""Settings of R1-V, VisualThinker-R1-Zero, TRL and EasyR1 -> settings of this trainer."""

from vtfast.cli.migration.mapping import Fate, Migration, migrate

__all__ = ["Fate", "Migration", "migrate"]
