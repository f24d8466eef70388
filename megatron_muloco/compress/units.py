"""What is encoded together, and what shares a scale inside it: arithmetic, no torch.

A `CodingUnit` is a flat range of one local tensor: what a rank's shard and a chunk of the outer
group leave of it. Encoder and decoder both know the unit, so that no payload carries a header. A
`Grouping` cuts the unit into groups, which share a scale or table::

    row, unit of 11 values that starts 3 values into a row of 4      .|aaaa|bbbb|cc    head 1
    block of 4                                                       aaaa|bbbb|ccc     head 0
    tensor                                                           aaaaaaaaaaa       one group
"""

from dataclasses import dataclass
from typing import Literal

__all__ = ["CodingUnit", "Granularity", "Grouping", "Groups"]

Granularity = Literal["tensor", "row", "block"]


@dataclass(frozen=True, slots=True)
class CodingUnit:
    """A flat range of a local tensor that is encoded by itself.

    Attributes:
        numel: Values in the range.
        row_width: Length of a row of the local tensor; 0 for a tensor that is one row.
        row_offset: Place of the first value in its row.
    """

    numel: int
    row_width: int = 0
    row_offset: int = 0

    def __post_init__(self) -> None:
        """Refuse a place outside the row."""
        if self.numel < 0 or not 0 <= self.row_offset < max(1, self.row_width):
            raise ValueError(f"not a coding unit: {self}")

    @property
    def raw_bytes(self) -> int:
        """Bytes of the values in fp32."""
        return 4 * self.numel


@dataclass(frozen=True, slots=True)
class Groups:
    """Consecutive groups of a unit: one of ``head``, ``count`` of ``width``, one of ``tail``.

    Zero lengths are no groups.
    """

    head: int
    count: int
    width: int
    tail: int

    @property
    def number(self) -> int:
        """Groups in all."""
        return bool(self.head) + self.count + bool(self.tail)

    def matrices(self) -> tuple[tuple[int, int], ...]:
        """Return (groups, width) of the parts that lie one behind the other in the unit."""
        parts = ((1, self.head), (self.count, self.width), (1, self.tail))
        return tuple((count, width) for count, width in parts if count * width)


@dataclass(frozen=True, slots=True)
class Grouping:
    """What shares one scale.

    Attributes:
        granularity: The whole unit, each row of the tensor, or each block of the unit.
        block_size: Values in a block; used with granularity block only.
    """

    granularity: Granularity = "tensor"
    block_size: int = 256

    def __post_init__(self) -> None:
        """Refuse blocks of nothing."""
        if self.block_size < 1:
            raise ValueError(f"block_size is {self.block_size}, and must be at least 1")

    def groups(self, unit: CodingUnit) -> Groups:
        """Return the groups of a unit, in the order of its values."""
        width = {"tensor": unit.numel, "row": unit.row_width, "block": self.block_size}
        size = width[self.granularity] or unit.numel
        head = 0
        if self.granularity == "row" and unit.row_offset:
            head = min(unit.numel, size - unit.row_offset)
        count, tail = divmod(unit.numel - head, max(1, size))
        return Groups(head, count, size, tail)
