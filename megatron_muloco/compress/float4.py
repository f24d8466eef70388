"""E3M0: four bits as sign and exponent, the format of the streaming paper's outer gradients.

The paper (Douillard et al. 2025, arXiv 2501.18512) names the format and gives no scale. Here each
group is scaled by its largest magnitude, and the smallest exponent stands for zero.
"""

import torch
from torch import Tensor
from typing_extensions import override

from megatron_muloco.compress.grouped import GroupedCodec, blocks
from megatron_muloco.compress.units import Grouping

__all__ = ["E3M0"]

_EXPONENTS = 8
_SIGN = 8  # the bit


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
        largest = values.abs().amax(dim=1, keepdim=True)
        divisor = torch.where(largest > 0, largest, 1.0)
        magnitudes = self._magnitudes(values.device)
        edges = (magnitudes[1:] + magnitudes[:-1]) / 2
        for rows, columns in blocks(values):
            block = values[rows, columns]
            code = torch.bucketize(
                (block / divisor[rows]).abs_(), edges, out_int32=True, right=True
            )
            codes[rows, columns] = (code + _SIGN * (block < 0)).to(torch.uint8)
        return largest

    @override
    def _levels(self, heads: Tensor) -> Tensor:
        magnitudes = self._magnitudes(heads.device)
        return heads * torch.cat([magnitudes, -magnitudes])

    @staticmethod
    def _magnitudes(device: torch.device) -> Tensor:
        exponents = torch.arange(_EXPONENTS, device=device, dtype=torch.float32)
        magnitudes = torch.exp2(exponents - (_EXPONENTS - 1))
        magnitudes[0] = 0.0
        return magnitudes
