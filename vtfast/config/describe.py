"""What help texts and pages say of the settings, read from the fields themselves."""

from __future__ import annotations

from vtfast.config.fields import GRPO, SFT, Optimizer, Output, Rollout, Task
from vtfast.config.runs import Config, RunConfig
from vtfast.config.section import Section, choices
from vtfast.config.values import to_flag

SECTIONS: tuple[type[Section], ...] = (Task, GRPO, SFT, Rollout, Optimizer, Output)


def field_names(kind: type[RunConfig] = Config) -> tuple[str, ...]:
    return tuple(kind.model_fields)


def field_help(kind: type[RunConfig] = Config) -> dict[str, str]:
    """The docstring under each field of `kind`, by name, with the values that the field's type allows filled in."""
    return {
        name: (field.description or "").replace("{choices}", ", ".join(choices(field.annotation)))
        for name, field in kind.model_fields.items()
    }


def field_sections(kind: type[RunConfig] = Config) -> dict[type[Section], tuple[str, ...]]:
    """The sections of `kind`, in order, and the names of the fields of each."""
    return {section: tuple(section.model_fields) for section in SECTIONS if issubclass(kind, section)}


def field_defaults(kind: type[RunConfig] = Config) -> dict[str, str]:
    """The default of each setting, as a flag would write it."""
    return {name: to_flag(field.get_default(call_default_factory=True)) for name, field in kind.model_fields.items()}
