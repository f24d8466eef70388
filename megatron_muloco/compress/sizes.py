"""Bytes of payloads, known before there are values: arithmetic, no torch, for codecs and plans.

A unit whose payload would not be smaller than its fp32 values is sent as those; that rule is here.
"""

from dataclasses import dataclass
from typing import Protocol

from megatron_muloco.compress.units import CodingUnit, Grouping

__all__ = ["GroupedSize", "PayloadSize", "RawSize", "TopKSize", "is_raw", "packed_bytes"]


class PayloadSize(Protocol):
    """Knows how many bytes a unit takes."""

    def payload_bytes(self, unit: CodingUnit) -> int:
        """Return the exact size of the unit's payload."""


def is_raw(size: PayloadSize, unit: CodingUnit) -> bool:
    """Whether a unit is sent as its fp32 values."""
    return size.payload_bytes(unit) == unit.raw_bytes


def packed_bytes(count: int, bits: int) -> int:
    """Return the bytes of ``count`` packed values; the last byte may have unused bits."""
    return -(-count * bits // 8)


@dataclass(frozen=True, slots=True)
class RawSize:
    """fp32 as it is."""

    def payload_bytes(self, unit: CodingUnit) -> int:
        """See `PayloadSize.payload_bytes`."""
        return unit.raw_bytes


@dataclass(frozen=True, slots=True)
class GroupedSize:
    """A head of fp32 numbers for each group, then a code for each value.

    Attributes:
        bits: Of a code.
        head_width: Numbers of a head.
        grouping: What shares a head.
    """

    bits: int
    head_width: int
    grouping: Grouping

    def payload_bytes(self, unit: CodingUnit) -> int:
        """See `PayloadSize.payload_bytes`."""
        heads = 4 * self.head_width * self.grouping.groups(unit).number
        return min(heads + packed_bytes(unit.numel, self.bits), unit.raw_bytes)


@dataclass(frozen=True, slots=True)
class TopKSize:
    """The largest values of each block, and their places.

    Attributes:
        density: Share of the values that is sent.
        value_bytes: Of a value sent as it is: 4 or 2.
        grouping: The blocks.
        value_bits: Of the code of a value sent; None if they are sent as they are.
    """

    density: float
    value_bytes: int
    grouping: Grouping
    value_bits: int | None = None

    def payload_bytes(self, unit: CodingUnit) -> int:
        """See `PayloadSize.payload_bytes`."""
        parts = self.grouping.groups(unit).matrices()
        values = self.values_bytes(sum(count * self.kept(width) for count, width in parts))
        places = sum(self.place_bytes(count, width) for count, width in parts)
        return min(values + places, unit.raw_bytes)

    def values_bytes(self, count: int) -> int:
        """Return the bytes of all ``count`` values that a unit sends."""
        return self._coded_bytes(count) if self.is_coded(count) else self.value_bytes * count

    def is_coded(self, count: int) -> bool:
        """Whether ``count`` values are coded: not if there are too few to pay for the table."""
        return self.value_bits is not None and self._coded_bytes(count) < self.value_bytes * count

    def _coded_bytes(self, count: int) -> int:
        """One table of fp32 levels, then codes."""
        assert self.value_bits is not None
        table = GroupedSize(self.value_bits, 1 << self.value_bits, Grouping())
        return table.payload_bytes(CodingUnit(count))

    def kept(self, width: int) -> int:
        """Return how many values of a block of ``width`` are sent."""
        return max(1, round(self.density * width))

    def place_bits(self, width: int) -> int:
        """Return the bits of a place in a block of ``width``."""
        return max(1, (width - 1).bit_length())

    def is_mask(self, width: int) -> bool:
        """Whether one bit for every value is no more than a place for each value kept."""
        return width <= self.kept(width) * self.place_bits(width)

    def place_bytes(self, count: int, width: int) -> int:
        """Return the bytes of the places of ``count`` blocks of ``width``."""
        if self.is_mask(width):
            return packed_bytes(count * width, 1)
        return packed_bytes(count * self.kept(width), self.place_bits(width))
