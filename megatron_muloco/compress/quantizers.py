"""Quantizers: codecs that replace every value by a code of a few bits.

Each is a `codec.GroupedCodec`. A group of values has a head of fp32 numbers, and a value is decoded
to the level that its code selects::

    payload = [ heads of all groups, fp32 | codes of all values, packed ]

- `Linear`: uniform levels between the smallest and the largest value of a group.
- `E3M0`: signed powers of two below the largest magnitude of a group.
- `statistical.Statistical`: bins around the mean of a group, each decoded to the mean of its
  values.

Encoding is bitwise reproducible: it depends neither on the number of threads nor on the sizes of
the blocks in which long units are processed.
"""

from functools import cache

import torch
from torch import Tensor
from typing_extensions import override

from megatron_muloco.compress.codec import (
    GroupedCodec,
    column_blocks,
    write_codes,
)
from megatron_muloco.compress.format import Grouping, e3m0_format, linear_format

__all__ = ["E3M0", "Linear"]


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
