"""What the codes of a few bits have in common: groups, a head of numbers for each, packed codes.

    payload = [ heads of all groups, fp32 | codes of all values, packed ]

A subclass says what a head holds, how it follows from a group's values, and which `2**bits` levels
it stands for; a value is decoded to the level that its code names.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

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

__all__ = ["GroupedCodec", "blocks"]

# 128 KiB of fp32: a block, its fp64 copy and its codes stay in the second-level cache.
_BLOCK_VALUES = 1 << 15


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
        pairs = zip(parts, codes_of_parts, strict=True)
        head = torch.cat([self._encode_groups(part, into).flatten() for part, into in pairs])
        refuse_non_finite(head)
        return torch.cat([to_bytes(head), pack(codes, self.bits)])

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
            for rows, columns in blocks(part):
                index = codes_of_part[rows, columns].long()
                part[rows, columns] = self._levels(heads_of_part[rows]).gather(1, index)
            first += len(part)

    def _decode_one(self, packed: Tensor, levels: Tensor, out: Tensor) -> None:
        """Decode a unit that is one group: a table of bytes gives all values of a byte at once."""
        every_byte = torch.arange(256, dtype=torch.uint8, device=packed.device)
        per_byte = 8 // self.bits
        table = levels[unpack(every_byte, self.bits, 256 * per_byte).long()].view(256, per_byte)
        for start in range(0, packed.numel(), _BLOCK_VALUES // per_byte):
            part = packed[start : start + _BLOCK_VALUES // per_byte]
            decoded = table.index_select(0, part.int()).flatten()
            place = out[start * per_byte : start * per_byte + decoded.numel()]
            place.copy_(decoded[: place.numel()])


def blocks(matrix: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield slices of rows and columns that cut a matrix into pieces of about the cache's size.

    Rows are cut only where there is a single one.
    """
    count, width = matrix.shape
    rows = max(1, _BLOCK_VALUES // width)
    columns = _BLOCK_VALUES if count == 1 else width
    for row in range(0, count, rows):
        for column in range(0, width, columns):
            yield slice(row, row + rows), slice(column, column + columns)
