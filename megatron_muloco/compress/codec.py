"""`Codec`: the interface of all codecs, what quantizers share, and encoding with error feedback.

A codec is a pure function of the values and their coding unit. It has no state and knows no process
group. A payload has no header, because sender and receiver know the unit, and its size is known
before the values are.

Rules for every codec:

- A unit whose payload would not be smaller than its fp32 values is sent raw. This includes empty
  units (no bytes), single values, and units whose tables would be larger than what they save.
- Values that are not finite are an error. A replica that has any sends nothing (weight 0).
- Finite values of any size are allowed, up to the largest of fp32 and down to subnormal.

Error feedback keeps what an encoding lost, and adds it to the next round's values::

    v = x + decay * residual;  q = D(E(v));  residual <- v - q

Each encoder has its own residual: a replica keeps e for its pseudogradients, the owner of a chunk
keeps f for the mean. The decay is below 1 because old losses belong to an anchor that has moved
since (MuLoCo's research code, facebookresearch/MuLoCo).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import override

from megatron_muloco.compress.format import (
    CodingUnit,
    GroupedFormat,
    Grouping,
    PayloadSize,
    RawFormat,
    is_raw,
    packed_bytes,
)
from megatron_muloco.errors import SyncError

__all__ = [
    "Codec",
    "ErrorFeedback",
    "GroupedCodec",
    "RawFallback",
    "Uncoded",
    "block_values",
    "column_blocks",
    "encode",
    "from_bytes",
    "group_matrices",
    "pack",
    "refuse_non_finite",
    "table_index",
    "to_bytes",
    "unpack",
    "write_codes",
]


class Codec(PayloadSize, Protocol):
    """Writes a coding unit into bytes and reads it back; a pure function."""

    def encode(self, values: Tensor, unit: CodingUnit) -> Tensor:
        """Return the payload of ``values``.

        Args:
            values: fp32, ``[unit.numel]``; not modified.
            unit: The coding unit.

        Returns:
            uint8, ``[payload_bytes(unit)]``.

        Raises:
            SyncError: A value is not finite.
        """

    def decode(self, payload: Tensor, unit: CodingUnit, out: Tensor) -> None:
        """Write the decoded values to ``out``.

        Args:
            payload: uint8, ``[payload_bytes(unit)]``; may begin at any address.
            unit: The coding unit.
            out: fp32, ``[unit.numel]``; overwritten.
        """


class RawFallback:
    """Base of codecs that send a unit raw where encoding would not make it smaller.

    Subclasses implement `_encode` and `_decode`, which are called for all other units only.

    Args:
        size: Payload size rule of the codec.
    """

    def __init__(self, size: PayloadSize) -> None:
        self._size = size

    def payload_bytes(self, unit: CodingUnit) -> int:
        """See `PayloadSize.payload_bytes`."""
        return self._size.payload_bytes(unit)

    def encode(self, values: Tensor, unit: CodingUnit) -> Tensor:
        """See `Codec.encode`."""
        assert values.shape == (unit.numel,), (values.shape, unit)
        if is_raw(self._size, unit):
            refuse_non_finite(values)
            return to_bytes(values)
        payload = self._encode(values, unit)
        assert payload.numel() == self.payload_bytes(unit), (payload.numel(), unit)
        return payload

    def decode(self, payload: Tensor, unit: CodingUnit, out: Tensor) -> None:
        """See `Codec.decode`."""
        assert payload.numel() == self.payload_bytes(unit), (payload.numel(), unit)
        if is_raw(self._size, unit):
            out.copy_(from_bytes(payload, torch.float32))
        else:
            self._decode(payload, unit, out)

    def _encode(self, values: Tensor, unit: CodingUnit) -> Tensor:
        raise NotImplementedError

    def _decode(self, payload: Tensor, unit: CodingUnit, out: Tensor) -> None:
        raise NotImplementedError


class Uncoded(RawFallback):
    """Sends fp32 values unchanged; for parameters that are excluded from compression."""

    def __init__(self) -> None:
        super().__init__(RawFormat())


def to_bytes(values: Tensor) -> Tensor:
    """Return a copy of ``values`` as flat uint8."""
    return values.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


def from_bytes(payload: Tensor, dtype: torch.dtype) -> Tensor:
    """Return bytes as values of ``dtype``, copied because a view needs an aligned address."""
    return payload.clone().view(dtype)


def group_matrices(flat: Tensor, grouping: Grouping, unit: CodingUnit) -> list[Tensor]:
    """Return views ``[groups, width]`` of a unit, one for each run of groups of equal width."""
    shapes = grouping.groups(unit).matrices()
    pieces = flat.split([count * width for count, width in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def refuse_non_finite(values: Tensor) -> None:
    """Raise unless all ``values`` are finite.

    A codec may pass scales or sums instead, where any non-finite value makes those non-finite too.
    """
    if not bool(torch.isfinite(values).all()):
        raise SyncError(
            "some values are not finite. The guard already excludes replicas whose pseudogradient "
            "is not finite, so this one overflowed when its residual was added. Lower inner.lr or "
            "outer.compression.error_decay."
        )


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
# Error feedback.


class ErrorFeedback:
    """Residuals of one encoder, by name; zero at first.

    Args:
        decay: Factor on a residual when it is added again.

    Attributes:
        residuals: The live residuals that were requested so far.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.residuals: dict[str, Tensor] = {}

    def of(self, name: str, numel: int, device: torch.device) -> Tensor:
        """Return the live residual of ``name``, fp32, ``[numel]``."""
        if name not in self.residuals:
            self.residuals[name] = torch.zeros(numel, device=device)
        return self.residuals[name]

    def forget(self) -> None:
        """Set all residuals to zero."""
        for residual in self.residuals.values():
            residual.zero_()

    def load(self, residuals: Mapping[str, Tensor]) -> None:
        """Replace all residuals by copies of ``residuals``."""
        self.residuals = {name: residual.clone() for name, residual in residuals.items()}


def encode(
    codec: Codec,
    unit: CodingUnit,
    values: Tensor,
    payload: Tensor,
    residual: Tensor | None,
    decay: float,
) -> Tensor:
    """Encode a unit into ``payload`` and write what the encoding lost to ``residual``.

    Args:
        codec: Codec of the unit.
        unit: The coding unit.
        values: x, fp32, ``[unit.numel]``; not modified.
        payload: uint8, ``[payload_bytes(unit)]``; overwritten.
        residual: e or f of these values, updated in place; ``None`` without error feedback.
        decay: Factor on the old residual.

    Returns:
        Squared norms of what was encoded and of what the encoding lost, ``[2]``, fp64.
    """
    if residual is not None:
        # Two operations with two roundings, as in the reference. ``add(alpha=decay)`` may be a
        # fused multiply-add with one rounding, which would give other bits.
        values = values + residual * decay
    payload.copy_(codec.encode(values, unit))
    decoded = torch.empty_like(values)
    codec.decode(payload, unit, decoded)
    lost = torch.sub(values, decoded, out=decoded if residual is None else residual)
    return torch.stack([torch.dot(values, values), torch.dot(lost, lost)]).double()
