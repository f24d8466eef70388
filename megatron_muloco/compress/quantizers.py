"""Quantizers: codecs that replace every value by a code of a few bits.

All share `GroupedCodec`. Each group of values has a head of fp32 numbers, and a value is decoded to
the level that its code selects::

    payload = [ heads of all groups, fp32 | codes of all values, packed ]

- `Linear`: uniform levels between the smallest and the largest value of a group.
- `E3M0`: signed powers of two below the largest magnitude of a group.
- `statistical.Statistical`: bins around the mean of a group, each decoded to the mean of its
  values.

Encoding is bitwise reproducible: it depends neither on the number of threads nor on the sizes of
the blocks in which long units are processed.
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
from megatron_muloco.compress.format import (
    CodingUnit,
    GroupedFormat,
    Grouping,
    e3m0_format,
    linear_format,
    packed_bytes,
)

__all__ = [
    "E3M0",
    "GroupedCodec",
    "Linear",
    "block_values",
    "column_blocks",
    "pack",
    "table_index",
    "unpack",
    "write_codes",
]


# ------------------------------------------------------------------------------------------
# Packing of codes into bytes without gaps: `pack` and `unpack`.
#
# Widths of 1, 2, 4 and 8 bits divide a byte: value i of a byte is in bits ``[i * bits, ...)``. To
# pack, as many codes as fill a byte are read as one integer word, and one multiplication moves all
# of them into the word's highest byte. So packing is one operation over contiguous memory. Other
# widths (indices) are packed bit by bit. Words are little-endian, as on every host of torch's
# accelerators.


_WORDS = {1: torch.int64, 2: torch.int32, 4: torch.int16}
# Code i of a word starts at bit 8 * i and must move to ``top + i * bits``, where top is 8 bits
# below the end of the word. Each move is a shift, and the sum of the shifts is one factor. The
# other products either fall off the end, or land below the top without overlapping, so none
# carries.
_GATHER = {
    bits: sum(1 << (8 * (8 // bits - 1) - i * (8 - bits)) for i in range(8 // bits))
    for bits in _WORDS
}
# Steps (shift, mask) from packed to unpacked; each one doubles the number of separate fields.
_SPREAD = {
    1: ((28, 0x0000000F_0000000F), (14, 0x0003_0003_0003_0003), (7, 0x01010101_01010101)),
    2: ((12, 0x000F_000F), (6, 0x03030303)),
    4: ((4, 0x0F0F),),
}
_MAX_BITS = 16


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return ``codes`` as packed bytes.

    Args:
        codes: Integers in ``[0, 2**bits)``, flat; uint8 for up to 8 bits, else int32.
        bits: Width of a code, 1 to 16.

    Returns:
        uint8, ``[packed_bytes(len(codes), bits)]``; unused bits of the last byte are 0.
    """
    if bits == 8:
        return codes.to(torch.uint8, copy=True)
    if bits not in _WORDS:
        return _pack_any(codes, bits)
    per_byte = 8 // bits
    surplus = -codes.numel() % per_byte
    padded = torch.nn.functional.pad(codes, (0, surplus)) if surplus else codes.contiguous()
    word = padded.view(-1, per_byte).view(_WORDS[bits]).flatten()
    # The shift is arithmetic and copies the sign; the conversion to uint8 drops these bits.
    return (word * _GATHER[bits] >> 8 * (per_byte - 1)).to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return ``count`` codes that `pack` packed; uint8 for up to 8 bits, else int32."""
    assert packed.numel() == packed_bytes(count, bits), (packed.numel(), bits, count)
    if bits == 8:
        return packed.clone()
    if bits not in _WORDS:
        return _unpack_any(packed, bits, count)
    word = packed.to(_WORDS[bits])
    for shift, mask in _SPREAD[bits]:
        word = word.bitwise_or_(word << shift).bitwise_and_(mask)
    return word.view(torch.uint8)[:count]


def _pack_any(codes: Tensor, bits: int) -> Tensor:
    assert 1 <= bits <= _MAX_BITS, bits
    places = torch.arange(bits, dtype=torch.int32, device=codes.device)
    single = ((codes.to(torch.int32)[:, None] >> places) & 1).flatten().to(torch.uint8)
    return pack(single, 1)


def _unpack_any(packed: Tensor, bits: int, count: int) -> Tensor:
    assert 1 <= bits <= _MAX_BITS, bits
    places = torch.arange(bits, dtype=torch.int32, device=packed.device)
    single = unpack(packed, 1, packed.numel() * 8)[: count * bits].view(count, bits)
    codes = (single.to(torch.int32) << places).sum(1, dtype=torch.int32)
    return codes.to(torch.uint8) if bits < 8 else codes


# ------------------------------------------------------------------------------------------
# What all quantizers share.

# 512 KiB of fp32, the fastest of 2**13 to 2**18 in a measurement. Smaller blocks would stay in the
# second-level cache, but the overhead of more operator calls is larger than that gain.
_BLOCK_VALUES = 1 << 17
# On accelerators, where launching a kernel takes longer than processing such a block. Temporaries
# of a block are then up to 64 MiB.
_DEVICE_BLOCK_VALUES = 1 << 22
# Dtype whose element is as large as the decoded fp32 values of one packed byte, by bits. Viewed as
# this dtype, the table of all bytes is indexed with one copy per byte. The largest dtype has 16
# bytes, so at 1 bit an element holds half a byte's values, and a table row two elements.
_ENTRIES = {8: torch.float32, 4: torch.float64, 2: torch.complex128, 1: torch.complex128}


class GroupedCodec(RawFallback, ABC):
    """Base of codecs with a code of ``bits`` bits for every value and a head for every group.

    A subclass defines what a head holds, how to compute it and the codes from the values, and the
    ``2**bits`` levels that it stands for.

    Args:
        format: Bits of a code (8, 4, 2 or 1), fp32 numbers of a head, and the groups.
    """

    def __init__(self, format: GroupedFormat) -> None:
        if format.bits not in (8, 4, 2, 1):
            raise ValueError(f"bits is {format.bits}; known are 8, 4, 2 and 1")
        self.bits, self.grouping = format.bits, format.grouping
        self.head_width = format.head_width
        super().__init__(format)

    @property
    def level_count(self) -> int:
        """Number of levels that a code can select."""
        return 1 << self.bits

    @property
    def _table_width(self) -> int:
        """Width of the tables that encoding or decoding a group needs."""
        return self.level_count

    @abstractmethod
    def _encode_groups(self, values: Tensor, codes: Tensor) -> Tensor:
        """Write the codes of some groups and return their heads.

        The caller passes several groups that are together at most one block, or a single group of
        any width. A value that is not finite must make its head non-finite.

        Args:
            values: fp32, ``[groups, width]``.
            codes: uint8, ``[groups, width]``; overwritten.

        Returns:
            fp32, ``[groups, head_width]``.
        """

    @abstractmethod
    def _levels(self, heads: Tensor) -> Tensor:
        """Return the decoded value of each code, fp32, ``[groups, level_count]``."""

    @override
    def _encode(self, values: Tensor, unit: CodingUnit) -> Tensor:
        codes = torch.empty(unit.numel, dtype=torch.uint8, device=values.device)
        parts = group_matrices(values, self.grouping, unit)
        codes_of_parts = group_matrices(codes, self.grouping, unit)
        head = torch.cat(
            [
                self._encode_groups(part[rows], into[rows]).flatten()
                for part, into in zip(parts, codes_of_parts, strict=True)
                for rows in _row_blocks(part, self._table_width)
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
        """Decode a unit of one group with a table of all 256 bytes: one look-up per byte."""
        per_byte = 8 // self.bits
        table = levels.index_select(0, _codes_of_bytes(self.bits, packed.device))
        table = table.view(256, per_byte).view(_ENTRIES[self.bits]).squeeze(1)
        for part, place in zip(
            packed.split(block_values(packed.device) // per_byte),
            out.split(block_values(packed.device)),
            strict=True,
        ):
            decoded = table.index_select(0, part.int()).view(torch.float32).flatten()
            place.copy_(decoded[: place.numel()])


@cache
def _codes_of_bytes(bits: int, device: torch.device) -> Tensor:
    """Return the codes in each of the 256 bytes, concatenated, int32."""
    every_byte = torch.arange(256, dtype=torch.uint8, device=device)
    return unpack(every_byte, bits, 256 * 8 // bits).int()


def write_codes(places: Tensor, codes: Tensor, levels: int) -> Tensor:
    """Write ``places``, clamped to ``[0, levels)`` and rounded down, to ``codes``.

    fp32 to int32 to uint8 in two steps: torch vectorises each of them, but not fp32 to uint8.

    Args:
        places: fp32; overwritten.
        codes: uint8 of the same shape; overwritten.
        levels: Number of levels, 2 to 256.

    Returns:
        The codes as int32.
    """
    rounded = places.clamp_(0, levels - 1).int()
    codes.copy_(rounded)
    return rounded


def table_index(codes: Tensor, width: int) -> Tensor:
    """Turn int32 codes ``[rows, n]`` into flat indices of a table ``[rows, width]``, in place."""
    if len(codes) > 1:
        rows = torch.arange(len(codes), dtype=torch.int32, device=codes.device)
        codes += rows.mul_(width).unsqueeze_(1)
    return codes.flatten()


def block_values(device: torch.device) -> int:
    """Return the number of values that are processed at a time."""
    return _BLOCK_VALUES if device.type == "cpu" else _DEVICE_BLOCK_VALUES


def _row_blocks(matrix: Tensor, table_width: int) -> Iterator[slice]:
    """Yield runs of rows; each run, and a table of ``table_width`` for it, is at most a block."""
    count, width = matrix.shape
    rows = max(1, block_values(matrix.device) // max(width, table_width))
    for row in range(0, count, rows):
        yield slice(row, row + rows)


def column_blocks(matrix: Tensor) -> Iterator[slice]:
    """Yield slices that cut long rows into blocks."""
    size = block_values(matrix.device)
    for column in range(0, matrix.shape[1], size):
        yield slice(column, column + size)


# ------------------------------------------------------------------------------------------
# The quantizers.


class Linear(GroupedCodec):
    """Min-max quantisation, rounded to nearest.

    With L = 2**bits - 1 steps, the error is at most ``(max - min) / (2 L)`` plus a few roundings of
    the larger of |min| and |max|. A constant group is exact. So are the smallest and the largest
    value of any other group, unless a step is subnormal.

    Args:
        bits: Bits of a code: 8, 4, 2 or 1.
        grouping: Groups that share minimum and maximum, 8 bytes each.
    """

    def __init__(self, bits: int, grouping: Grouping) -> None:
        super().__init__(linear_format(bits, grouping))

    @override
    def _encode_groups(self, values: Tensor, codes: Tensor) -> Tensor:
        # Not aminmax, which is not vectorised along a dimension.
        low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
        steps = self.level_count - 1
        # Computed with halves, because the range of finite values may overflow. A step is 0 for a
        # constant group, or for one so small that its steps underflow; any level is then as good.
        # Divided by a tensor: by a number, CUDA multiplies with the reciprocal, which rounds twice.
        step = (high / 2 - low / 2) / torch.full_like(high, steps)
        step = torch.where(step > 0, step, 1.0)
        for columns in column_blocks(values):
            scaled = torch.add(-low / 2, values[:, columns], alpha=0.5).div_(step)
            write_codes(scaled.round_(), codes[:, columns], self.level_count)
        return torch.cat([low, high], dim=1)

    @override
    def _levels(self, heads: Tensor) -> Tensor:
        low, high = heads.double().split(1, dim=1)
        steps = self.level_count - 1
        place = torch.arange(self.level_count, dtype=torch.float64, device=heads.device)
        place /= torch.full_like(place, steps)  # as in `_encode_groups`
        return torch.lerp(low, high, place).float()


_EXPONENTS = 8
_SIGN = 8  # the sign bit of a code
_OTHER_BITS = 22  # mantissa bits of an fp32 number behind the first one


class E3M0(GroupedCodec):
    """Sign and exponent in four bits: 0 and ``max * 2**-6 ... max``, rounded to nearest.

    The error is at most a third of the value, or ``max / 128`` if that is more, plus roundings. A
    group of zeros is exact.

    Source: the format of the outer gradients in Streaming DiLoCo (Douillard et al. 2025, arXiv
    2501.18512), which gives no scale. Here each group is scaled by its largest magnitude, and the
    smallest exponent stands for zero.

    Args:
        grouping: Groups that share the largest magnitude, 4 bytes each.
    """

    def __init__(self, grouping: Grouping) -> None:
        super().__init__(e3m0_format(grouping))

    @override
    def _encode_groups(self, values: Tensor, codes: Tensor) -> Tensor:
        largest = torch.maximum(values.amax(1, keepdim=True), -values.amin(1, keepdim=True))
        divisor = torch.where(largest > 0, largest, 1.0)
        table = _codes_by_leading_bits(values.device)
        for columns in column_blocks(values):
            ratios = (values[:, columns] / divisor).view(torch.int32)
            leading = (ratios >> _OTHER_BITS).bitwise_and_(len(table) - 1).flatten()
            place = codes[:, columns]
            place.copy_(table.index_select(0, leading).view(place.shape))
        return largest

    @override
    def _levels(self, heads: Tensor) -> Tensor:
        magnitudes = _magnitudes(heads.device)
        return heads * torch.cat([magnitudes, -magnitudes])


@cache
def _codes_by_leading_bits(device: torch.device) -> Tensor:
    """Return the code of each combination of sign, exponent and first mantissa bit, uint8.

    These bits determine the code, because the rounding edges are 2**-7 and 1.5 times larger powers
    of two.
    """
    leading = torch.arange(1 << (32 - _OTHER_BITS), dtype=torch.int32, device=device)
    ratios = (leading << _OTHER_BITS).view(torch.float32)
    magnitudes = _magnitudes(device)
    edges = (magnitudes[1:] + magnitudes[:-1]) / 2
    code = torch.bucketize(ratios.abs(), edges, right=True)
    return (code + _SIGN * (ratios < 0)).to(torch.uint8)


def _magnitudes(device: torch.device) -> Tensor:
    exponents = torch.arange(_EXPONENTS, device=device, dtype=torch.float32)
    magnitudes = torch.exp2(exponents - (_EXPONENTS - 1))
    magnitudes[0] = 0.0
    return magnitudes
