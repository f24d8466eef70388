"""Bins over six standard deviations, each decoded to the mean of what fell into it."""

import torch
from torch import Tensor
from typing_extensions import override

from megatron_muloco.compress.grouped import GroupedCodec, blocks

__all__ = ["Statistical"]

_RANGE = 6.0  # standard deviations, MuLoCo's research code (facebookresearch/MuLoCo)
# Deviations are summed as multiples of 2**-20 standard deviations. They are integers, so that
# fp64 adds up 2**33 of them exactly: any order, any device gives the same mean.
_FRACTION = 2.0**20
_MAX_FP32 = torch.finfo(torch.float32).max


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
        bins = self.level_count
        centre = mean.float()
        per_bin = (bins / (_RANGE * deviation)).clamp_(max=_MAX_FP32).float()
        scale = torch.where(deviation > 0, _FRACTION / deviation, 0.0)
        counts = torch.zeros(len(values), bins, dtype=torch.float64, device=values.device)
        sums = torch.zeros_like(counts)
        for rows, columns in blocks(values):
            block = values[rows, columns]
            place = (block - centre[rows]).mul_(per_bin[rows]).add_(bins / 2)
            code = place.nan_to_num_(0.0).clamp_(0, bins - 1).to(torch.uint8)
            codes[rows, columns] = code
            first_bin = torch.arange(len(block), device=values.device)[:, None] * bins
            index = (first_bin + code).flatten()
            weights = (block - mean[rows]).mul_(scale[rows]).round_().flatten()
            size = len(block) * bins
            counts[rows] += torch.bincount(index, minlength=size).view(-1, bins)
            sums[rows] += torch.bincount(index, weights, minlength=size).view(-1, bins)
        # A bin that nothing fell into is never decoded; the mean stands in for it.
        means = mean + sums / counts.clamp(min=1) * torch.where(scale > 0, 1 / scale, 0.0)
        heads: Tensor = means.float()
        return heads

    @override
    def _levels(self, heads: Tensor) -> Tensor:
        return heads


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each row, fp64, [rows, 1].

    Sums are over deviations from the row's first value, which lies within sqrt(width) standard
    deviations of the mean: the squares cancel little, and not at all in a constant row.
    """
    first = values[:, :1].double()
    total, squares = torch.zeros_like(first), torch.zeros_like(first)
    for rows, columns in blocks(values):
        shifted = values[rows, columns] - first[rows]
        total[rows] += shifted.sum(1, keepdim=True)
        squares[rows] += shifted.square_().sum(1, keepdim=True)
    shift = total / values.shape[1]
    variance = (squares / values.shape[1] - shift * shift).clamp_(min=0)
    return first + shift, variance.sqrt()
