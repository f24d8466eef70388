"""`Section`: base class of every config section, and the number types that sections share."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

__all__ = ["Count", "Degree", "Extent", "Layers", "Minutes", "PositiveInt", "Section", "Seed"]


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


# Upper bounds are far above what any run uses. They keep a slip of the keyboard from a plan that
# needs hours, from an overflow in another library, and from arrays that no memory holds.
PositiveInt = Annotated[int, Field(ge=1, le=10**12)]
Count = Annotated[int, BeforeValidator(_whole_number), Field(ge=1, le=10**18)]
Extent = Annotated[int, Field(ge=1, le=10**8)]  # of a dimension of a tensor
Layers = Annotated[int, Field(ge=1, le=1024)]  # the plan tries all splits into stages
Degree = Annotated[int, Field(ge=1, le=2**16)]  # ranks along one axis
Minutes = Annotated[float, Field(gt=0, le=366 * 24 * 60)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy's generators take
