"""`Section`: base class of every config section, and the number types that sections share."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

__all__ = ["Count", "PositiveInt", "Section"]


class Section(BaseModel):
    """A frozen group of keys that refuses unknown keys.

    Types are strict: a quoted ``"4"`` is not the number 4. Every field has a description with its
    unit, from which the reference page is generated.
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
    """Accept ``3e9`` as a count; YAML reads it as a float."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, BeforeValidator(_whole_number), Field(ge=1)]
