"""`Statistical`: a quantizer whose bins follow the distribution of a group's values.

Values are measured from the mean of their group, in steps that are a small part of its standard
deviation. A value first falls into one of 256 or 64 narrow cells, and bins are runs of cells. Four
bins by each rule::

    sigma     -8    -3    -2.25  -1.5   -0.75    0     0.75    1.5   2.25     3     8
    edged      |                  |              |              |                    |
    centred    |            |            |             |                             |
    cells      ||||||||||||||||||||||||||||||||||||||||||||||||||||||||||||||||||||||||

A bin is decoded to the mean of its values. These means are the head of the payload, so a decoder
needs to know neither the rule nor the edges.

The error of any bins follows from the number n_c and the sum s_c of each cell's values. For bins B
with N_B values and the sum S_B, measured from the mean::

    sum (x - m_B)**2  =  sum x**2 - 2 sum_B m_B S_B + sum_B N_B m_B**2
                      =  sum x**2 - sum_B S_B**2 / N_B               since m_B = S_B / N_B

The first term is the same for all bins, so the bins of least error have the largest *score*
``sum_B S_B**2 / N_B``. One pass over the values fills the cells, and no candidate is decoded.
"""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor
from typing_extensions import override

from megatron_muloco.compress.codec import (
    GroupedCodec,
    column_blocks,
    refuse_non_finite,
    table_index,
    write_codes,
)
from megatron_muloco.compress.format import Bins, Grouping, statistical_format

__all__ = ["Statistical"]

_RANGE = 6.0  # standard deviations, MuLoCo's research code (facebookresearch/MuLoCo)
# Bin means must not depend on the order of summation, which differs between devices and numbers of
# threads. So values are first rounded to integer multiples of 2**-20 standard deviations from the
# mean. Over a group the magnitudes of these integers average at most 2**20, and fp64 adds 2**33 of
# them exactly.
_STEPS = 2.0**20  # in a standard deviation


@dataclass(frozen=True, slots=True)
class _Grid:
    """Cells around the mean, as many on either side, and how often edges are moved over them.

    Attributes:
        cells: Number of cells, at most 256, so that a cell's number fits the byte of a code.
        steps: Width of a cell.
        iterations: Iterations of Lloyd's algorithm.
    """

    cells: int
    steps: float
    iterations: int


# In both grids, the edges of both rules are edges of cells, for 1, 2 and 4 bits. The cells reach
# beyond 3 standard deviations, as the best outer edges of heavy tails do. On pseudogradients, more
# iterations gain less than 1 % at 1 and 2 bits.
_WIDE = _Grid(256, _STEPS / 16, iterations=6)
# A group of few values is not worth as many cells.
_NARROW = _Grid(64, _STEPS * 3 / 16, iterations=2)
_WIDE_FROM = 4096  # values of a group
# With 8 bits a cell is a bin, and nothing is left to choose.
_BYTES = _Grid(256, _STEPS * _RANGE / 256, iterations=0)
# Half of the length from which torch splits a sum over threads (at::internal::GRAIN_SIZE). Above it
# the order of summation would depend on the number of threads.
_RUN = 1 << 14


class Statistical(GroupedCodec):
    """Bins between edges around the mean, each decoded to the mean of its values.

    With n bins, `_RANGE` / n standard deviations are one width w. The bins are one of:

    - ``edged``: edges at the mean and every w from it; a value has the code
      ``floor((x - mean) / w + n / 2)``.
    - ``centred``: a bin around the mean; ``floor((x - mean) / w + n / 2 + 1 / 2)``. It is the rule
      of MuLoCo's research code, which divides by the sample's standard deviation and rounds a half
      to even.
    - ``least_error``: the bins of least squared error among those two and what a few iterations of
      Lloyd's algorithm make of each (S. P. Lloyd, "Least squares quantization in PCM", 1982; method
      I). With 8 bits they are ``edged``.

    Values beyond fall into the outermost bins. The error of a value is at most the width of its
    bin, plus the distance by which the group exceeds the outermost edges, plus roundings. Errors
    cancel over a bin, so the mean of a group is preserved.

    Args:
        bits: Bits of a code: 8, 4, 2 or 1.
        grouping: Groups that share the bins and the table of means, ``4 * 2**bits`` bytes each.
        bins: Rule for the edges of bins.
    """

    def __init__(self, bits: int, grouping: Grouping, bins: Bins = "least_error") -> None:
        super().__init__(statistical_format(bits, grouping, bins))
        self.bins = bins

    @property
    @override
    def _table_width(self) -> int:
        return 2 * _WIDE.cells  # numbers and sums

    @override
    def _encode_groups(self, values: Tensor, codes: Tensor) -> Tensor:
        mean, deviation = _moments(values)
        refuse_non_finite(deviation)  # before it becomes an index into the table
        scale = torch.where(deviation > 0, _STEPS / deviation, 0.0)
        grid = self._grid(values.shape[1])
        below = self._fill_cells(values, codes, mean, scale, grid)
        edges = self._edges(below, grid)
        if grid is not _BYTES:
            _replace_cells_by_bins(codes, edges, grid)
        counts, sums = _of_bins(below, edges)
        above = sums / counts * torch.where(scale > 0, 1 / scale, 0.0)
        # An empty bin is never decoded; the group's mean replaces the 0 / 0.
        heads: Tensor = torch.where(counts > 0, mean + above, mean).float()
        return heads

    def _grid(self, width: int) -> _Grid:
        if self.bits == 8:
            return _BYTES
        return _WIDE if width >= _WIDE_FROM else _NARROW

    def _fill_cells(
        self, values: Tensor, codes: Tensor, mean: Tensor, scale: Tensor, grid: _Grid
    ) -> Tensor:
        """Write the cell of every value to ``codes``.

        Returns:
            Number and sum, in steps, of the values below each edge of a cell; fp64,
            ``[2, groups, cells + 1]``.
        """
        shape = (len(values), grid.cells)
        cells = torch.zeros(2, *shape, dtype=torch.float64, device=values.device)
        counts, sums = cells
        middle = grid.cells / 2 + (_shift(self.bins) if grid is _BYTES else 0)
        for columns in column_blocks(values):
            steps = values[:, columns].double().sub_(mean).mul_(scale).round_()
            # Steps inside the cells are at most 2**23, so fp32 represents them exactly. The
            # distance of a place to the next edge, at least 1 / grid.steps, is more than its
            # rounding errors.
            places = steps.float().div_(grid.steps).add_(middle)
            index = write_codes(places, codes[:, columns], grid.cells)
            # Of a single group the codes, bytes, are counted faster than the same int32 numbers.
            index = table_index(index, grid.cells) if len(values) > 1 else codes[0, columns]
            size = counts.numel()
            counts += torch.bincount(index, minlength=size).view(shape)
            sums += torch.bincount(index, steps.flatten(), size).view(shape)
        # Cells are clamped to the range, the summed steps are not: outliers count in full in the
        # means of the outermost bins, and so the errors of a group cancel. All sums are exact.
        return torch.nn.functional.pad(cells.cumsum_(2), (1, 0))

    def _edges(self, below: Tensor, grid: _Grid) -> Tensor:
        """Return the first cell of each bin, and the number of cells; see `_of_bins`."""
        groups, device = below.shape[1], below.device
        if grid is _BYTES:
            return torch.arange(grid.cells + 1, device=device).expand(groups, -1)
        if self.bins != "least_error":
            edges = _rule_edges(self.bits, self.bins, grid)
            return torch.tensor(edges, device=device).expand(groups, -1)
        starts = _rule_edges(self.bits, "edged", grid), _rule_edges(self.bits, "centred", grid)
        if groups == 1:
            return torch.tensor([_least_error_of_one(below[:, 0], starts, grid)], device=device)
        return _least_error(below, torch.tensor(starts, device=device), grid)

    @override
    def _levels(self, heads: Tensor) -> Tensor:
        return heads


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each row, fp64, ``[rows, 1]``.

    Variance is the mean of squares minus the squared mean, in one pass. The cancellation leaves an
    error of about 2**-26 of the largest value in the deviation, below an fp32 ulp.
    """
    total = torch.zeros(len(values), 1, dtype=torch.float64, device=values.device)
    squares = torch.zeros_like(total)
    # An accelerator sums a row in an order of its own, the same each time, and would need several
    # launches for every run.
    length = _RUN if values.device.type == "cpu" else values.shape[1]
    for columns in column_blocks(values):
        for run in values[:, columns].double().split(length, dim=1):
            total += run.sum(1, keepdim=True)
            squares += torch.linalg.vector_norm(run, dim=1, keepdim=True).square_()
    mean = total / values.shape[1]
    variance = (squares / values.shape[1] - mean * mean).clamp_(min=0)
    return mean, variance.sqrt()


# ------------------------------------------------------------------------------------------
# Edges of bins: numbers of cells, int64, ``[groups, bins + 1]``, from 0 to the number of cells.


def _shift(bins: Bins) -> float:
    """Return what a rule adds to a place before rounding down."""
    return 0.5 if bins == "centred" else 0.0


@cache
def _rule_edges(bits: int, bins: Bins, grid: _Grid) -> tuple[int, ...]:
    """Return the edges of a rule."""
    count = 1 << bits
    width = _RANGE * _STEPS / count / grid.steps  # of a bin, in cells; an even number
    inner = ((k - count / 2 - _shift(bins)) * width + grid.cells / 2 for k in range(1, count))
    return (0, *map(int, inner), grid.cells)


def _of_bins(below: Tensor, edges: Tensor) -> Tensor:
    """Return number and sum of the values of each bin, fp64, ``[2, groups, bins]``."""
    return below.gather(2, edges.expand(2, -1, -1)).diff(dim=2)


def _least_error(below: Tensor, starts: Tensor, grid: _Grid) -> Tensor:
    """Return the edges with the largest score: of all ``starts``, or moved from one of them.

    Args:
        below: See `Statistical._fill_cells`.
        starts: Edges of some rules, ``[rules, bins + 1]``.
        grid: The cells.
    """
    groups, rules = below.shape[1], len(starts)
    # Every start is a group of its own, so all are moved together.
    below = below.repeat(1, rules, 1)
    edges = starts.repeat_interleave(groups, dim=0)
    of_bins = _of_bins(below, edges)
    candidates, scores = [edges], [_scores(of_bins)]
    for _ in range(grid.iterations):
        edges = _moved(edges, of_bins, grid)
        of_bins = _of_bins(below, edges)
    candidates.append(edges)
    scores.append(_scores(of_bins))
    best = torch.cat(scores).view(-1, groups).argmax(dim=0)  # the first of equals
    return torch.cat(candidates)[best * groups + torch.arange(groups, device=edges.device)]


def _least_error_of_one(
    below: Tensor, starts: tuple[tuple[int, ...], ...], grid: _Grid
) -> tuple[int, ...]:
    """Return what `_least_error` does for a single group, ``below`` of ``[2, cells + 1]``.

    The same arithmetic on numbers instead of tensors, because a call of an operator takes longer
    than computing a few bins: this is most of what small coding units cost.
    """
    counts, sums = below.tolist()

    def of_bins(edges: tuple[int, ...]) -> list[tuple[float, float]]:
        return [(counts[b] - counts[a], sums[b] - sums[a]) for a, b in pairwise(edges)]

    middle, moved = grid.cells // 2, []
    for edges in starts:
        for _ in range(grid.iterations):
            means = [
                summed / count / grid.steps if count else min(max(0.0, a - middle), b - middle)
                for (count, summed), (a, b) in zip(of_bins(edges), pairwise(edges), strict=True)
            ]
            inner = [round((left + right) / 2 + middle) for left, right in pairwise(means)]
            before, edges = (
                edges,
                (0, *(min(max(each, 0), grid.cells) for each in inner), grid.cells),
            )
            if edges == before:
                break  # it would not move again
        moved.append(edges)

    def score(edges: tuple[int, ...]) -> float:
        total = 0.0
        for count, summed in of_bins(edges):
            total += summed * summed / max(count, 1.0)  # sum() may compensate roundings
        return total

    return max((*starts, *moved), key=score)  # the first of equals


def _scores(of_bins: Tensor) -> Tensor:
    """Return the score of each group, ``[groups]``; a cumulative sum adds in the order of bins."""
    counts, sums = of_bins
    scores: Tensor = (sums * sums / counts.clamp(min=1)).cumsum_(1)[:, -1]
    return scores


def _moved(edges: Tensor, of_bins: Tensor, grid: _Grid) -> Tensor:
    """Return edges after one step of Lloyd's algorithm, rounded to edges of cells.

    An edge moves half way between the means of its two bins. An empty bin has no mean; the point
    of it that is nearest to the group's mean takes its place. So empty bins move to where values
    are. Rounding may increase the error.
    """
    counts, sums = of_bins
    places = (edges - grid.cells // 2).double()
    nearest = places[:, :-1].clamp(min=0) + places[:, 1:].clamp(max=0)
    means = torch.where(counts > 0, sums / counts / grid.steps, nearest)
    middles = (means[:, 1:] + means[:, :-1]).div_(2).add_(grid.cells // 2)
    moved = edges.clone()
    moved[:, 1:-1] = middles.round_().clamp_(0, grid.cells)
    return moved


def _replace_cells_by_bins(codes: Tensor, edges: Tensor, grid: _Grid) -> None:
    """Replace the cell of every value by its bin, in place.

    Args:
        codes: uint8, ``[groups, width]``.
        edges: Edges of the bins of each group.
        grid: The cells.
    """
    inner = edges[:, 1:-1]
    table = torch.zeros(len(edges), grid.cells + 1, dtype=torch.uint8, device=codes.device)
    table.scatter_add_(1, inner, torch.ones_like(inner, dtype=torch.uint8))
    flat = table.cumsum(1, dtype=torch.uint8)  # the bin of a cell is the number of edges up to it
    for columns in column_blocks(codes):
        place = codes[:, columns]
        index = table_index(place.int(), grid.cells + 1)
        place.copy_(flat.flatten().index_select(0, index).view(place.shape))
