"""Packing of small unsigned integers (codes) into bytes without gaps: `pack` and `unpack`.

Widths of 1, 2, 4 and 8 bits divide a byte: value i of a byte is in bits ``[i * bits, ...)``. To
pack, as many codes as fill a byte are read as one integer word, and one multiplication moves all of
them into the word's highest byte. So packing is one operation over contiguous memory. Other widths
(indices) are packed bit by bit. Words are little-endian, as on every host of torch's accelerators.
"""

import torch
from torch import Tensor

from megatron_muloco.compress.format import packed_bytes

__all__ = ["pack", "unpack"]

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
