"""Bytes of payloads, known before there are values: arithmetic, no torch, for codecs and plans.

A unit whose payload would not be smaller than its fp32 values is sent as those; that rule is here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from megatron_muloco.config.outer import (
    ExceptionsConfig,
    LossyCompression,
    TopKCompression,
)

__all__ = [
    "CodecSpec",
    "CodingUnit",
    "Granularity",
    "GroupedSize",
    "Grouping",
    "Groups",
    "ParameterClass",
    "PayloadSize",
    "RawSize",
    "TopKSize",
    "is_raw",
    "packed_bytes",
    "parameter_class",
    "payload_size",
    "spec_of",
]


# ------------------------------------------------------------------------------------------
# What is encoded together, and what shares a scale inside it: arithmetic, no torch.
#
# A `CodingUnit` is a flat range of one local tensor: what a rank's shard and a chunk of the outer
# group leave of it. Encoder and decoder both know the unit, so that no payload carries a header. A
# `Grouping` cuts the unit into groups, which share a scale or table::
#
#     row, unit of 11 values that starts 3 values into a row of 4      .|aaaa|bbbb|cc    head 1
#     block of 4                                                       aaaa|bbbb|ccc     head 0
#     tensor                                                           aaaaaaaaaaa       one group


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


# ------------------------------------------------------------------------------------------


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


# ------------------------------------------------------------------------------------------
# Which code each parameter travels in, from the config. No torch: plans and runs both ask.


ParameterClass = Literal["norm", "embedding", "output", "matrix"]

# fp32 numbers in the head of a group: what a decoder needs beside the codes.
_HEAD_WIDTH: dict[str, Callable[[int], int]] = {
    "linear": lambda bits: 2,
    "statistical": lambda bits: 1 << bits,
    "e3m0": lambda bits: 1,
}
_VALUE_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, slots=True)
class CodecSpec:
    """The code of one parameter.

    Attributes:
        kind: ``raw`` is fp32 as it is.
        bits: Of a value; for ``topk`` of a value sent, ``None`` where those travel as they are.
        grouping: What shares a scale, or competes for being sent.
        density: Share of the values that is sent; ``topk`` only.
        wire_dtype: Of values that are sent as they are; ``topk`` only.
    """

    kind: Literal["raw", "linear", "statistical", "e3m0", "topk"]
    bits: int | None = None
    grouping: Grouping = field(default_factory=Grouping)
    density: float = 1.0
    wire_dtype: Literal["fp32", "bf16"] = "fp32"


def parameter_class(name: str) -> ParameterClass:
    """Return what a parameter is, from its model-wide name."""
    if name.startswith("embedding."):
        return "embedding"
    if name.startswith("output_layer."):
        return "output"
    return "norm" if "norm" in name else "matrix"


def spec_of(code: LossyCompression, name: str) -> CodecSpec:
    """Return the code of a parameter; the same on every rank."""
    exception = _exception(code.exceptions, parameter_class(name))
    if exception == "none":
        return CodecSpec("raw")
    if isinstance(code, TopKCompression):
        grouping = Grouping("block", code.block_size)
        return CodecSpec("topk", code.value_bits, grouping, code.density, code.wire_dtype)
    grouping = Grouping(code.granularity, code.values_per_block)
    return CodecSpec(code.kind, exception or code.bits, grouping)


def payload_size(spec: CodecSpec) -> PayloadSize:
    """Return what knows the bytes of a unit in this code."""
    if spec.kind == "raw":
        return RawSize()
    if spec.kind == "topk":
        return TopKSize(spec.density, _VALUE_BYTES[spec.wire_dtype], spec.grouping, spec.bits)
    assert spec.bits is not None
    return GroupedSize(spec.bits, _HEAD_WIDTH[spec.kind](spec.bits), spec.grouping)


def _exception(
    exceptions: ExceptionsConfig, of: ParameterClass
) -> Literal[8, 4, 2, 1, "none"] | None:
    return None if of == "matrix" else getattr(exceptions, of)
