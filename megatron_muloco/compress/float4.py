"""E3M0: four bits as sign and exponent, the format of the streaming paper's outer gradients.

The paper (Douillard et al. 2025, arXiv 2501.18512) names the format and gives no scale. Here each
group is scaled by its largest magnitude, and the smallest exponent stands for zero.
"""

from functools import cache

import torch
from torch import Tensor
from typing_extensions import override

from megatron_muloco.compress.grouped import GroupedCodec, column_blocks
from megatron_muloco.compress.units import Grouping

__all__ = ["E3M0"]

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
