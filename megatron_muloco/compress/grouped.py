"""What the codes of a few bits have in common: groups, a head of numbers for each, packed codes.

    payload = [ heads of all groups, fp32 | codes of all values, packed ]

A subclass says what a head holds, how it follows from a group's values, and which `2**bits` levels
it stands for; a value is decoded to the level that its code names.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor
from typing_extensions import override

from megatron_muloco.compress.codec import (
    RawFallback,
    from_bytes,
    group_matrices,
    refuse_non_finite,
    to_bytes,
)
from megatron_muloco.compress.packing import pack, unpack
from megatron_muloco.compress.sizes import GroupedSize
from megatron_muloco.compress.units import CodingUnit, Grouping

__all__ = ["GroupedCodec", "column_blocks", "table_index", "write_codes"]

# 512 KiB of fp32. Chosen by measurement, of 2**13 to 2**18: smaller blocks would stay in the
# second-level cache, but calling the operators costs more than that saves.
_BLOCK_VALUES = 1 << 17
# Where a launch costs more than a pass over such a block: as much as makes temporaries of 64 MiB.
_DEVICE_BLOCK_VALUES = 1 << 22
# What `torch.Tensor.view` calls a byte's worth of decoded values: an element is copied in one move.
_WORDS = {8: torch.float32, 4: torch.float64, 2: torch.complex128, 1: torch.complex128}


class GroupedCodec(RawFallback, ABC):
    """A codec that gives every value ``bits`` bits, and every group of values a head.

    Args:
        bits: 8, 4, 2 or 1.
        grouping: What shares a head.
    """

    def __init__(self, bits: int, grouping: Grouping) -> None:
        if bits not in (8, 4, 2, 1):
            raise ValueError(f"bits is {bits}; known are 8, 4, 2 and 1")
        self.bits, self.grouping = bits, grouping
        super().__init__(GroupedSize(bits, self.head_width, grouping))

    @property
    def level_count(self) -> int:
        """Values that a code can name."""
        return 1 << self.bits

    @property
    @abstractmethod
    def head_width(self) -> int:
        """fp32 numbers of a group's head."""

    @abstractmethod
    def _encode_groups(self, values: Tensor, codes: Tensor) -> Tensor:
        """Fill uint8 ``codes`` for ``values``, both [groups, width]; return [groups, head_width].

        Either there are several groups, together at most a block, or there is one of any width.
        Values that are not finite leave something in the head that is not finite either.
        """

    @abstractmethod
    def _levels(self, heads: Tensor) -> Tensor:
        """Return what each code stands for, [groups, level_count]."""

    @override
    def _encode(self, values: Tensor, unit: CodingUnit) -> Tensor:
        codes = torch.empty(unit.numel, dtype=torch.uint8, device=values.device)
        parts = group_matrices(values, self.grouping, unit)
        codes_of_parts = group_matrices(codes, self.grouping, unit)
        head = torch.cat(
            [
                self._encode_groups(part[rows], into[rows]).flatten()
                for part, into in zip(parts, codes_of_parts, strict=True)
                for rows in _row_blocks(part, self.level_count)
            ]
        )
        refuse_non_finite(head)
        packed = [pack(part, self.bits) for part in codes.split(block_values(codes.device))]
        return torch.cat([to_bytes(head), *packed])

    @override
    def _decode(self, payload: Tensor, unit: CodingUnit, out: Tensor) -> None:
        number = self.grouping.groups(unit).number
        head_bytes = 4 * self.head_width * number
        heads = from_bytes(payload[:head_bytes], torch.float32).view(number, self.head_width)
        if number == 1:
            self._decode_one(payload[head_bytes:], self._levels(heads)[0], out)
            return
        codes = unpack(payload[head_bytes:], self.bits, unit.numel)
        first = 0
        parts = group_matrices(out, self.grouping, unit)
        codes_of_parts = group_matrices(codes, self.grouping, unit)
        for part, codes_of_part in zip(parts, codes_of_parts, strict=True):
            heads_of_part = heads[first : first + len(part)]
            for rows in _row_blocks(part, self.level_count):
                levels = self._levels(heads_of_part[rows]).flatten()
                for columns in column_blocks(part):
                    place = part[rows, columns]
                    index = table_index(codes_of_part[rows, columns].int(), self.level_count)
                    place.copy_(levels.index_select(0, index).view(place.shape))
            first += len(part)

    def _decode_one(self, packed: Tensor, levels: Tensor, out: Tensor) -> None:
        """Decode a unit that is one group: a table of bytes gives all values of a byte at once."""
        per_byte = 8 // self.bits
        table = levels.index_select(0, _codes_of_bytes(self.bits, packed.device))
        table = table.view(256, per_byte).view(_WORDS[self.bits]).squeeze(1)
        for part, place in zip(
            packed.split(block_values(packed.device) // per_byte),
            out.split(block_values(packed.device)),
            strict=True,
        ):
            decoded = table.index_select(0, part.int()).view(torch.float32).flatten()
            place.copy_(decoded[: place.numel()])


@cache
def _codes_of_bytes(bits: int, device: torch.device) -> Tensor:
    """Return the codes in each of the 256 bytes, one behind the other, int32."""
    every_byte = torch.arange(256, dtype=torch.uint8, device=device)
    return unpack(every_byte, bits, 256 * 8 // bits).int()


def write_codes(places: Tensor, codes: Tensor, levels: int) -> Tensor:
    """Write places, rounded down into ``[0, levels)``, to uint8 ``codes``; return them as int32.

    Two conversions, because torch has vector code for each of them and not for both in one.

    Args:
        places: fp32, overwritten.
        codes: uint8 of the same shape.
        levels: 2 to 256.
    """
    rounded = places.clamp_(0, levels - 1).int()
    codes.copy_(rounded)
    return rounded


def table_index(codes: Tensor, width: int) -> Tensor:
    """Turn int32 codes, [rows, n], into flat ones of a table [rows, width], in place."""
    if len(codes) > 1:
        rows = torch.arange(len(codes), dtype=torch.int32, device=codes.device)
        codes += rows.mul_(width).unsqueeze_(1)
    return codes.flatten()


def block_values(device: torch.device) -> int:
    """Return how many values are worked on at a time."""
    return _BLOCK_VALUES if device.type == "cpu" else _DEVICE_BLOCK_VALUES


def _row_blocks(matrix: Tensor, table_width: int) -> Iterator[slice]:
    """Yield runs of rows that are at most a block each, and so is a table with a line for each."""
    count, width = matrix.shape
    rows = max(1, block_values(matrix.device) // max(width, table_width))
    for row in range(0, count, rows):
        yield slice(row, row + rows)


def column_blocks(matrix: Tensor) -> Iterator[slice]:
    """Yield slices that cut long rows into blocks."""
    size = block_values(matrix.device)
    for column in range(0, matrix.shape[1], size):
        yield slice(column, column + size)
