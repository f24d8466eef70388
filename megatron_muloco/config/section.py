"""The base of every config section: frozen, strict, and closed to unknown keys."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

__all__ = ["Count", "PositiveInt", "Section"]


class Section(BaseModel):
    """A group of keys that cannot be changed after it was checked.

    Strict: a quoted ``"4"`` is not the number 4 and ``yes`` is not a count. Every field carries a
    description with its unit, which becomes the reference page.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=False,
        protected_namespaces=(),
    )


def _whole_number(value: Any) -> Any:
    """Let ``3e9`` stand for a count; YAML reads it as a float."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, BeforeValidator(_whole_number), Field(ge=1)]
