"""Settings of R1-V, VisualThinker-R1-Zero, TRL and EasyR1 -> settings of vtfast. Start with `convert.py`; the
tables are in `name_tables.py`."""

from vtfast.cli.migration.convert import Migration, Outcome, migrate

__all__ = ["Migration", "Outcome", "migrate"]
