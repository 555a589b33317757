"""Settings of R1-V, VisualThinker-R1-Zero, TRL and EasyR1 -> settings of vtfast. Start with `mapping.py`; the
tables are in `rules.py`."""

from vtfast.cli.migration.mapping import Migration, Outcome, migrate

__all__ = ["Migration", "Outcome", "migrate"]
