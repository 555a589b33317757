"""The pydantic model that every section of the settings inherits from, and its error messages."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from vtfast.config.problems import Problem
from vtfast.config.values import BadValue, format_value, parse_value
from vtfast.utils.did_you_mean import nearest


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _read_text(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        return parse_value(value, cls.model_fields[info.field_name].annotation)

    def changed(self) -> set[str]:
        """Names of the settings that differ from their defaults."""
        fields = type(self).model_fields
        return {name for name, value in self if value != fields[name].get_default(call_default_factory=True)}


def problem_from_pydantic(error: ErrorDetails, kind: type[Section]) -> Problem:
    """Turns pydantic's error about one setting into a Problem."""
    name, value = str(error["loc"][0]), error["input"]
    if error["type"] == "extra_forbidden":
        hint = nearest(f"--{name}", [f"--{known}" for known in kind.model_fields])
        return Problem(f"--{name}: unknown; {hint}", (name,))
    if error["type"] == "too_short":
        return Problem(f"--{name}: name at least one", (name,))
    if error["type"] == "value_error":  # raised by `parse_value` or by a field's own validator
        reason = error["ctx"]["error"]
        return Problem(f"--{name} {reason}" if isinstance(reason, BadValue) else f"--{name}: {reason}", (name,))
    return Problem(f"--{name} {format_value(value)}: {allowed(kind.model_fields[name])}", (name,))


def choices(annotation: Any) -> tuple[str, ...]:
    """The words that a type such as `list[Literal["a", "b"]]` allows; empty if it has no Literal."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return next((found for part in get_args(annotation) if (found := choices(part))), ())


def allowed(field: FieldInfo) -> str:
    """What a field's type and bounds allow, as the end of an error message."""
    if words := choices(field.annotation):
        return f"must be one of {', '.join(words)}"
    low = high = ""
    for bound in field.metadata:
        if isinstance(bound, annotated_types.Ge):
            low = f"at least {bound.ge}"
        elif isinstance(bound, annotated_types.Gt):
            low = f"above {bound.gt}"
        elif isinstance(bound, annotated_types.Le):
            high = f"at most {bound.le}"
        elif isinstance(bound, annotated_types.Lt):
            high = f"below {bound.lt}"
    if (low, high) == ("at least 0", ""):
        return "must not be negative"
    return f"must be {' and '.join(filter(None, (low, high)))}"
