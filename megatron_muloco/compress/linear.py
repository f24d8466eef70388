"""Uniform levels between the smallest and the largest value of a group."""

import torch
from torch import Tensor
from typing_extensions import override

from megatron_muloco.compress.grouped import GroupedCodec, column_blocks, write_codes

__all__ = ["Linear"]


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
