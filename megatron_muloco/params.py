"""What a rank holds of each parameter: the words of optimizer, outer step and checkpoint.

Megatron cuts a parameter twice: over tensor-parallel ranks along one dimension, and, for the
optimizer, over data-parallel ranks into flat ranges that may start and end anywhere::

    linear_fc1.weight [2*ffn, h]  --tp dim 0-->  local tensor [2*ffn/tp, h]  --dp-->  flat [start,
    end)

A `Shard` names one such flat range of one local tensor. No torch here: this is arithmetic.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["ParamInfo", "Shard", "coverage"]


@dataclass(frozen=True, slots=True)
class ParamInfo:
    """One trainable parameter as one rank's module holds it.

    Attributes:
        name: Model-wide name; layers are numbered over all pipeline stages.
        local_shape: Shape of this rank's tensor-parallel piece.
        partition_dim: Dimension split over tensor-parallel ranks; ``None`` when every one of them
            holds the same tensor (norms).
        duplicate: True where another rank of the replica holds the same values and speaks for them
            in the outer step: replicated tensors on tensor-parallel ranks above 0, and the tied
            output embedding of the last pipeline stage.
    """

    name: str
    local_shape: tuple[int, ...]
    partition_dim: int | None
    duplicate: bool

    @property
    def numel(self) -> int:
        """Elements of the local tensor."""
        return math.prod(self.local_shape)


@dataclass(frozen=True, slots=True)
class Shard:
    """The flat range ``[start, end)`` of a local tensor whose fp32 master lives on this rank."""

    param: ParamInfo
    start: int
    end: int

    def __post_init__(self) -> None:
        """Refuse a range that does not lie inside the local tensor."""
        if not 0 <= self.start <= self.end <= self.param.numel:
            raise ValueError(
                f"{self.param.name}: range [{self.start}, {self.end}) is not inside a tensor of "
                f"{self.param.numel} elements"
            )

    @property
    def name(self) -> str:
        """Name of the parameter."""
        return self.param.name

    @property
    def numel(self) -> int:
        """Elements that this rank holds."""
        return self.end - self.start


def coverage(given: Iterable[str], wanted: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the names of ``wanted`` that ``given`` misses, and those it repeats or adds."""
    counts = Counter(iter(given))  # names, also those of a mapping, whose values are not counts
    expected = set(wanted)
    missing = sorted(expected - counts.keys())
    surplus = sorted(name for name, count in counts.items() if count > 1 or name not in expected)
    return missing, surplus
