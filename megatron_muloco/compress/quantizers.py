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
from megatron_muloco.compress.format import CodingUnit, GroupedSize, Grouping
from megatron_muloco.compress.packing import pack, unpack

__all__ = [
    "E3M0",
    "GroupedCodec",
    "Linear",
    "Statistical",
    "column_blocks",
    "table_index",
    "write_codes",
]

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


# ------------------------------------------------------------------------------------------
# Uniform levels between the smallest and the largest value of a group.


class Linear(GroupedCodec):
    """Min-max quantisation, rounded to nearest.

    With L = 2**bits - 1 steps, the error is at most ``(max - min) / (2 L)`` and a few roundings of
    the larger of |min| and |max|. A constant group is exact, and so are the smallest and the
    largest value of any other, unless a step is subnormal.

    Args:
        bits: 8, 4, 2 or 1.
        grouping: What shares minimum and maximum: 8 bytes a group.
    """

    @property
    @override
    def head_width(self) -> int:
        """Minimum and maximum."""
        return 2

    @override
    def _encode_groups(self, values: Tensor, codes: Tensor) -> Tensor:
        # Not aminmax, which has no vector code along a dimension.
        low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
        steps = self.level_count - 1
        # Halves, because the range of finite values may be infinite. A step of 0 is of a constant
        # group, or of one so small that its steps vanish: level 0 is then as good as any.
        step = (high / 2 - low / 2) / steps
        step = torch.where(step > 0, step, 1.0)
        for columns in column_blocks(values):
            scaled = torch.add(-low / 2, values[:, columns], alpha=0.5).div_(step)
            write_codes(scaled.round_(), codes[:, columns], self.level_count)
        return torch.cat([low, high], dim=1)

    @override
    def _levels(self, heads: Tensor) -> Tensor:
        low, high = heads.double().split(1, dim=1)
        steps = self.level_count - 1
        place = torch.arange(self.level_count, dtype=torch.float64, device=heads.device) / steps
        return torch.lerp(low, high, place).float()


# ------------------------------------------------------------------------------------------
# Bins over six standard deviations, each decoded to the mean of what fell into it.


_RANGE = 6.0  # standard deviations, MuLoCo's research code (facebookresearch/MuLoCo)
# Values are summed as multiples of 2**-21 standard deviations above the lowest edge. They are
# integers, so that fp64 adds up 2**30 of them exactly: any order, any device gives the same mean.
_STEPS = _RANGE * 2.0**21
# Half of what torch begins to split over threads (at::internal::GRAIN_SIZE), where the order of a
# sum would depend on their number.
_RUN = 1 << 14


class Statistical(GroupedCodec):
    """Equal bins over mean +- 3 sigma, with everything beyond in the outermost ones.

    The error is at most a bin, ``6 sigma / 2**bits``, plus how far the group reaches beyond 3
    sigma, plus roundings. Over a group, errors cancel: the mean is kept.

    Args:
        bits: 8, 4, 2 or 1.
        grouping: What shares the bins and the table of means: ``4 * 2**bits`` bytes a group.
    """

    @property
    @override
    def head_width(self) -> int:
        """The mean of each bin."""
        return self.level_count

    @override
    def _encode_groups(self, values: Tensor, codes: Tensor) -> Tensor:
        mean, deviation = _moments(values)
        refuse_non_finite(deviation)  # before a place in the table follows from it
        bins = self.level_count
        lowest = mean - _RANGE / 2 * deviation
        scale = torch.where(deviation > 0, _STEPS / (_RANGE * deviation), 0.0)
        counts = torch.zeros(len(values), bins, dtype=torch.float64, device=values.device)
        sums = torch.zeros_like(counts)
        for columns in column_blocks(values):
            steps = values[:, columns].double().sub_(lowest).mul_(scale).round_()
            # fp32 holds the steps inside the range exactly: they are below 2**24.
            code = write_codes(steps.float().mul_(bins / _STEPS), codes[:, columns], bins)
            index, size = table_index(code, bins), len(code) * bins
            counts += torch.bincount(index, minlength=size).view(-1, bins)
            sums += torch.bincount(index, steps.flatten(), size).view(-1, bins)
        above = (sums / counts - _STEPS / 2) * torch.where(scale > 0, 1 / scale, 0.0)
        # A bin that nothing fell into is never decoded; the mean stands in for it.
        heads: Tensor = torch.where(counts > 0, mean + above, mean).float()
        return heads

    @override
    def _levels(self, heads: Tensor) -> Tensor:
        return heads


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each row, fp64, [rows, 1].

    The squares are of the values, not of distances from the mean: where that leaves noise, it is
    2**-26 of the largest value, below an fp32 ulp.
    """
    total = torch.zeros(len(values), 1, dtype=torch.float64, device=values.device)
    squares = torch.zeros_like(total)
    for columns in column_blocks(values):
        for run in values[:, columns].double().split(_RUN, dim=1):
            total += run.sum(1, keepdim=True)
            squares += torch.linalg.vector_norm(run, dim=1, keepdim=True).square_()
    mean = total / values.shape[1]
    variance = (squares / values.shape[1] - mean * mean).clamp_(min=0)
    return mean, variance.sqrt()


# ------------------------------------------------------------------------------------------
# E3M0: four bits as sign and exponent, the format of the streaming paper's outer gradients.
#
# The paper (Douillard et al. 2025, arXiv 2501.18512) names the format and gives no scale. Here each
# group is scaled by its largest magnitude, and the smallest exponent stands for zero.


_EXPONENTS = 8
_SIGN = 8  # the bit
_OTHER_BITS = 22  # of an fp32 number behind its sign, exponent and first mantissa bit


class E3M0(GroupedCodec):
    """Signed powers of two below the largest magnitude: 0 and ``max * 2**-6 ... max``.

    Rounds to the nearest. The error is at most a third of the value, or ``max / 128`` if that is
    more, and roundings. A group of zeros is exact.

    Args:
        grouping: What shares the largest magnitude: 4 bytes a group.
    """

    def __init__(self, grouping: Grouping) -> None:
        super().__init__(4, grouping)

    @property
    @override
    def head_width(self) -> int:
        """The largest magnitude."""
        return 1

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

    These bits decide: magnitudes are rounded at 2**-7, and at 1.5 times larger powers of two.
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
