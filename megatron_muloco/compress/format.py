"""Payload formats: coding units, groups inside them, and the exact bytes of a payload.

A `CodingUnit` is a flat range of one local tensor: the part of a rank's shard that lies in one
chunk. Encoder and decoder both know the unit, so payloads have no header. A `Grouping` cuts the
unit into groups that share a scale or table::

    row, unit of 11 values that starts 3 values into a row of 4      .|aaaa|bbbb|cc    head 1
    block of 4                                                       aaaa|bbbb|ccc     head 0
    tensor                                                           aaaaaaaaaaa       one group

A unit whose payload would not be smaller than its fp32 values is sent raw.

Pure arithmetic without torch: codecs and the planner use the same functions.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal, Protocol

__all__ = [
    "Bins",
    "CodingUnit",
    "Format",
    "Granularity",
    "GroupedFormat",
    "Grouping",
    "Groups",
    "PayloadSize",
    "RawFormat",
    "StatisticalFormat",
    "TopKFormat",
    "e3m0_format",
    "is_raw",
    "linear_format",
    "packed_bytes",
    "statistical_format",
]


# ------------------------------------------------------------------------------------------
# Units and groups.


Granularity = Literal["tensor", "row", "block"]
Bins = Literal["least_error", "centred", "edged"]


@dataclass(frozen=True, slots=True)
class CodingUnit:
    """A flat range of a local tensor that is encoded by itself.

    Attributes:
        numel: Number of values in the range.
        row_width: Length of a row of the local tensor; 0 for a tensor that is one row.
        row_offset: Index of the range's first value in its row.
    """

    numel: int
    row_width: int = 0
    row_offset: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError for an offset outside the row."""
        if self.numel < 0 or not 0 <= self.row_offset < max(1, self.row_width):
            raise ValueError(f"not a coding unit: {self}")

    @property
    def raw_bytes(self) -> int:
        """Bytes of the unit in fp32."""
        return 4 * self.numel


@dataclass(frozen=True, slots=True)
class Groups:
    """Consecutive groups of a unit; a length of zero means no group.

    Attributes:
        head: Values in the first, started group.
        count: Number of full groups.
        width: Values in a full group.
        tail: Values in the last, unfinished group.
    """

    head: int
    count: int
    width: int
    tail: int

    @property
    def number(self) -> int:
        """Number of all groups."""
        return bool(self.head) + self.count + bool(self.tail)

    def matrices(self) -> tuple[tuple[int, int], ...]:
        """Return (groups, width) of each run of groups of one width, in the order of the unit."""
        parts = ((1, self.head), (self.count, self.width), (1, self.tail))
        return tuple((count, width) for count, width in parts if count * width)


@dataclass(frozen=True, slots=True)
class Grouping:
    """Rule that cuts a unit into groups.

    Attributes:
        granularity: What is a group: the whole unit, each row of the tensor, or each block.
        block_size: Values in a block; used with granularity block only.
    """

    granularity: Granularity = "tensor"
    block_size: int = 256

    def __post_init__(self) -> None:
        """Raise ValueError for an empty block."""
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


# ------------------------------------------------------------------------------------------
# Formats of payloads.

# Upper bounds of what encoding allocates, in bytes per value of the unit, with error feedback.
# Measured on a CPU for quantizers: 9 to 12.02 (two fp32 copies, codes, temporaries of packing). For
# top-k: 9, and 20 for each kept value, whose int64 place alone takes 8. Temporaries of one block,
# one or two megabytes, are not counted.
_ENCODING = 13
_SELECTING, _KEEPING = 10, 24


class PayloadSize(Protocol):
    """Payload size rule of a codec."""

    def payload_bytes(self, unit: CodingUnit) -> int:
        """Return the exact bytes of the unit's payload, at most ``unit.raw_bytes``."""


class Format(PayloadSize, Hashable, Protocol):
    """Payload format of a codec: exact bytes of payloads, and bounds of temporary memory.

    A format is a frozen dataclass; equal formats mean the same codec.
    """

    def encoding_bytes(self, numel: int) -> int:
        """Return the bytes that `codec.encode` allocates at most for a unit of ``numel`` values."""

    def decoding_bytes(self, numel: int) -> int:
        """Return the bytes that decoding allocates at most, with the decoded fp32 values."""


def is_raw(size: PayloadSize, unit: CodingUnit) -> bool:
    """Return whether a unit is sent as its fp32 values."""
    return size.payload_bytes(unit) == unit.raw_bytes


def packed_bytes(count: int, bits: int) -> int:
    """Return the bytes of ``count`` packed codes; the last byte may have unused bits."""
    return -(-count * bits // 8)


@dataclass(frozen=True, slots=True)
class RawFormat:
    """Unencoded fp32 values."""

    def payload_bytes(self, unit: CodingUnit) -> int:
        """See `PayloadSize.payload_bytes`."""
        return unit.raw_bytes

    def encoding_bytes(self, numel: int) -> int:
        """See `Format.encoding_bytes`."""
        return _ENCODING * numel

    def decoding_bytes(self, numel: int) -> int:
        """See `Format.decoding_bytes`."""
        return 2 * 4 * numel


@dataclass(frozen=True, slots=True)
class GroupedFormat:
    """A head of fp32 numbers for each group, then a packed code for each value.

    Attributes:
        bits: Bits of a code.
        head_width: fp32 numbers in a head.
        grouping: Groups that have a head each.
    """

    bits: int
    head_width: int
    grouping: Grouping

    def payload_bytes(self, unit: CodingUnit) -> int:
        """See `PayloadSize.payload_bytes`."""
        heads = 4 * self.head_width * self.grouping.groups(unit).number
        return min(heads + packed_bytes(unit.numel, self.bits), unit.raw_bytes)

    def encoding_bytes(self, numel: int) -> int:
        """See `Format.encoding_bytes`."""
        return _ENCODING * numel

    def decoding_bytes(self, numel: int) -> int:
        """See `Format.decoding_bytes`; values are decoded block by block."""
        return 4 * numel


def linear_format(bits: int, grouping: Grouping) -> GroupedFormat:
    """Return the format of `quantizers.Linear`; a head is minimum and maximum."""
    return GroupedFormat(bits, 2, grouping)


@dataclass(frozen=True, slots=True)
class StatisticalFormat(GroupedFormat):
    """A grouped format of a codec with a choice of bins, which changes no byte count.

    Attributes:
        bins: Rule for the edges of bins; only the encoder needs it.
    """

    bins: Bins = "least_error"


def statistical_format(
    bits: int, grouping: Grouping, bins: Bins = "least_error"
) -> StatisticalFormat:
    """Return the format of `statistical.Statistical`; a head is the mean of each bin."""
    return StatisticalFormat(bits, 1 << bits, grouping, bins)


def e3m0_format(grouping: Grouping) -> GroupedFormat:
    """Return the format of `quantizers.E3M0`; a head is the largest magnitude."""
    return GroupedFormat(4, 1, grouping)


@dataclass(frozen=True, slots=True)
class TopKFormat:
    """The largest values of each block, then their places in the block.

    Attributes:
        density: Share of the values that is sent.
        value_bytes: Bytes of an unencoded value: 4 or 2.
        grouping: Blocks in which values compete.
        value_bits: Bits of the code of a sent value; None where values are sent unencoded.
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

    def encoding_bytes(self, numel: int) -> int:
        """See `Format.encoding_bytes`."""
        return _SELECTING * numel + round(_KEEPING * self.density * numel)

    def decoding_bytes(self, numel: int) -> int:
        """See `Format.decoding_bytes`."""
        return 6 * numel + round(_KEEPING * self.density * numel)

    def values_bytes(self, count: int) -> int:
        """Return the bytes of the ``count`` values that a unit sends, without their places."""
        return self._coded_bytes(count) if self.is_coded(count) else self.value_bytes * count

    def is_coded(self, count: int) -> bool:
        """Return whether ``count`` values are encoded; few values do not pay for the table."""
        return self.value_bits is not None and self._coded_bytes(count) < self.value_bytes * count

    def _coded_bytes(self, count: int) -> int:
        """Return the bytes of one table of fp32 levels and the packed codes."""
        assert self.value_bits is not None
        return statistical_format(self.value_bits, Grouping()).payload_bytes(CodingUnit(count))

    def kept(self, width: int) -> int:
        """Return the number of values that a block of ``width`` sends."""
        return max(1, round(self.density * width))

    def place_bits(self, width: int) -> int:
        """Return the bits of one place in a block of ``width``."""
        return max(1, (width - 1).bit_length())

    def is_mask(self, width: int) -> bool:
        """Return whether a bitmap of the block is no larger than a place for each kept value."""
        return width <= self.kept(width) * self.place_bits(width)

    def place_bytes(self, count: int, width: int) -> int:
        """Return the bytes of all places in ``count`` blocks of ``width``."""
        if self.is_mask(width):
            return packed_bytes(count * width, 1)
        return packed_bytes(count * self.kept(width), self.place_bits(width))
