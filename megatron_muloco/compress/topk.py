"""`TopK`: a codec that sends the largest values of every block with their places."""

from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from megatron_muloco.compress.codec import (
    RawFallback,
    from_bytes,
    group_matrices,
    pack,
    refuse_non_finite,
    to_bytes,
    unpack,
)
from megatron_muloco.compress.format import CodingUnit, Grouping, TopKFormat
from megatron_muloco.compress.statistical import Statistical

__all__ = ["TopK"]

# Places of 12 bits. SparseLoCo (arXiv 2508.15706) also selects inside chunks of 4,096 values.
_BLOCK_SIZE = 4096
_MAX_BLOCK_SIZE = 1 << 16
_MAX_BF16 = torch.finfo(torch.bfloat16).max


class TopK(RawFallback):
    """Sends the ``density`` largest magnitudes of each block of a unit; the others become 0.

    ::

        payload = [ values, block by block | their places in the block, packed ]

    Places ascend inside a block; a bitmap of the block replaces them where that is smaller. A block
    of n values keeps ``density * n``, rounded, at least one. The error of the others is at most the
    smallest magnitude that their block keeps. Kept values are exact in fp32 and within a relative
    2**-9 in bf16, where magnitudes beyond the largest bf16 number become that number.

    With ``value_bits``, all kept values of a unit are encoded with one `Statistical` table, where
    that is smaller than sending them in ``wire_dtype``, with the bins of least squared error. Kept
    values form two clusters with a gap around 0. With one bit and clusters of similar size, the
    code is the sign. A table for each block would cost too much: at density 1/32 a block of 4,096
    keeps 128 values, 32 bytes at two bits, and its table would add 16 (at eight bits, 1,024 to
    128).

    Args:
        density: Share of the values that is sent, above 0 and at most 1.
        wire_dtype: Dtype of the values that are sent unencoded.
        block_size: Values that compete with each other; at most 65,536.
        value_bits: Bits of the code of a sent value: 8, 4, 2 or 1; None sends them unencoded.
    """

    def __init__(
        self,
        density: float,
        wire_dtype: Literal["fp32", "bf16"] = "fp32",
        block_size: int = _BLOCK_SIZE,
        value_bits: int | None = None,
    ) -> None:
        if not 0 < density <= 1:
            raise ValueError(f"density is {density}, and must be above 0 and at most 1")
        if not 1 <= block_size <= _MAX_BLOCK_SIZE:
            raise ValueError(f"block_size is {block_size}; places have at most 16 bits")
        self.density, self.grouping = density, Grouping("block", block_size)
        self._dtype = torch.bfloat16 if wire_dtype == "bf16" else torch.float32
        self._value_codec = Statistical(value_bits, Grouping()) if value_bits is not None else None
        self._sizes = TopKFormat(density, self._dtype.itemsize, self.grouping, value_bits)
        super().__init__(self._sizes)

    @override
    def _encode(self, values: Tensor, unit: CodingUnit) -> Tensor:
        kept, places = [], []
        for block in group_matrices(values, self.grouping, unit):
            count, width = block.shape
            index = block.abs().topk(self._sizes.kept(width), dim=1, sorted=False).indices
            index = index.sort(dim=1).values
            kept.append(block.gather(1, index).flatten())
            places.append(self._pack_places(index, count, width))
        sent = torch.cat(kept)
        # Enough to check what is sent: topk orders NaN and infinity above all finite magnitudes.
        refuse_non_finite(sent)
        return torch.cat([self._pack_values(sent), *places])

    @override
    def _decode(self, payload: Tensor, unit: CodingUnit, out: Tensor) -> None:
        parts = group_matrices(out.zero_(), self.grouping, unit)
        kept = [len(part) * self._sizes.kept(part.shape[1]) for part in parts]
        sizes = [self._sizes.place_bytes(*part.shape) for part in parts]
        sent, *places = payload.split([self._sizes.values_bytes(sum(kept)), *sizes])
        values = self._unpack_values(sent, sum(kept)).split(kept)
        for part, of_part, packed in zip(parts, values, places, strict=True):
            index = self._unpack_places(packed, *part.shape)
            part.scatter_(1, index, of_part.view(len(part), -1))

    def _pack_values(self, values: Tensor) -> Tensor:
        if self._value_codec and self._sizes.is_coded(len(values)):
            return self._value_codec.encode(values, CodingUnit(len(values)))
        if self._dtype is torch.bfloat16:
            values = values.clamp(-_MAX_BF16, _MAX_BF16)  # larger ones would round to infinity
        return to_bytes(values.to(self._dtype))

    def _unpack_values(self, packed: Tensor, count: int) -> Tensor:
        if self._value_codec and self._sizes.is_coded(count):
            values = torch.empty(count, dtype=torch.float32, device=packed.device)
            self._value_codec.decode(packed, CodingUnit(count), values)
            return values
        return from_bytes(packed, self._dtype).float()

    def _pack_places(self, index: Tensor, count: int, width: int) -> Tensor:
        if self._sizes.is_mask(width):
            mask = torch.zeros(count, width, dtype=torch.uint8, device=index.device)
            return pack(mask.scatter_(1, index, 1).flatten(), 1)
        bits = self._sizes.place_bits(width)
        codes = index.flatten()
        return pack(codes.to(torch.uint8 if bits <= 8 else torch.int32), bits)

    def _unpack_places(self, places: Tensor, count: int, width: int) -> Tensor:
        if self._sizes.is_mask(width):
            mask = unpack(places, 1, count * width).view(count, width)
            return mask.nonzero()[:, 1].view(count, -1)
        kept = self._sizes.kept(width)
        return unpack(places, self._sizes.place_bits(width), count * kept).long().view(count, kept)
