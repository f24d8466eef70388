"""Bins over six standard deviations, each decoded to the mean of what fell into it."""

import torch
from torch import Tensor
from typing_extensions import override

from megatron_muloco.compress.codec import refuse_non_finite
from megatron_muloco.compress.grouped import GroupedCodec, column_blocks, table_index, write_codes

__all__ = ["Statistical"]

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
