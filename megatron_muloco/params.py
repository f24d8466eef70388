"""`ParamInfo` and `Shard`: how optimizer, outer step and checkpoint describe what a rank holds.

Megatron cuts a parameter twice: over tensor-parallel ranks along one dimension, and, for the
optimizer, over data-parallel ranks into flat ranges that may start and end anywhere::

    linear_fc1.weight             [2*ffn, h]         the whole parameter
      |  tensor parallel: cut along partition_dim 0
    local tensor (ParamInfo)      [2*ffn/tp, h]      one tensor-parallel rank
      |  data parallel: a flat range of it
    master (Shard)                [start, end)       one rank

This module does not import torch.
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
        duplicate: True where another rank of the replica holds the same values and is the one that
            synchronises them in the outer step: replicated tensors on tensor-parallel ranks above
            0, and the tied output embedding of the last pipeline stage.
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
    """Compare names with those wanted, for every place that claims to be a partition.

    Returns:
        The names of ``wanted`` that ``given`` lacks, and those that it repeats or adds; sorted.
    """
    counts = Counter(iter(given))  # names, also those of a mapping, whose values are not counts
    expected = set(wanted)
    missing = sorted(expected - counts.keys())
    surplus = sorted(name for name, count in counts.items() if count > 1 or name not in expected)
    return missing, surplus
