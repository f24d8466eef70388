"""Products that are symmetric by construction, computed in their lower triangle only.

``X X^T`` is symmetric, and so is the product of two polynomials of one symmetric matrix, because
they commute. Half of such a product is known from the other half. The triangle is cut recursively
into square blocks below the diagonal, each as large as it can be, and small blocks on it; large
blocks keep the matrix kernels at their full rate.
"""

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["symmetric_product"]

# Blocks on the diagonal have an eighth of the rows (one half of them is computed twice, a sixteenth
# of the whole), but at least 128: below, kernels lose more of their rate than the triangle saves.
# Measured: docs/performance/newton_schulz.md.
_DIAGONAL_SHARE = 8
_SMALLEST_DIAGONAL_ROWS = 128

_Block = tuple[slice, slice]


def symmetric_product(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    *,
    add: Tensor | None = None,
    beta: float = 1.0,
    alpha: float = 1.0,
) -> None:
    """Write ``beta add + alpha left right`` into ``out``, of which only a triangle is computed.

    The caller promises that the product and ``add`` are symmetric; this is not checked. Outside the
    blocks on its diagonal the result is symmetric bit for bit.

    Args:
        left: ``[m, k]``.
        right: ``[k, m]``.
        out: ``[m, m]``, contiguous; neither ``left`` nor ``right``, but it may be ``add``.
        add: ``[m, m]``; ``alpha`` and ``beta`` have no effect without it.
        beta: Factor of ``add``.
        alpha: Factor of the product.
    """
    size = out.shape[0]
    diagonal_rows = max(_SMALLEST_DIAGONAL_ROWS, -(-size // _DIAGONAL_SHARE))
    for rows, columns in _lower_blocks(0, size, diagonal_rows):
        block = out[rows, columns]
        if add is None:
            torch.mm(left[rows], right[:, columns], out=block)
        else:
            torch.addmm(
                add[rows, columns],
                left[rows],
                right[:, columns],
                beta=beta,
                alpha=alpha,
                out=block,
            )
        if rows != columns:
            out[columns, rows].copy_(block.mT)


@lru_cache(maxsize=64)
def _lower_blocks(start: int, stop: int, diagonal_rows: int) -> tuple[_Block, ...]:
    """Return blocks that contain every element on and below the diagonal of ``[start, stop)``."""
    if stop - start <= diagonal_rows:
        whole = slice(start, stop)
        return ((whole, whole),)
    middle = (start + stop) // 2
    return (
        *_lower_blocks(start, middle, diagonal_rows),
        *_lower_blocks(middle, stop, diagonal_rows),
        (slice(middle, stop), slice(start, middle)),
    )
