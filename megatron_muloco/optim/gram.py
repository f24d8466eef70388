"""Newton-Schulz with fewer multiplications: symmetric products by halves, steps in pairs.

With m rows, n columns and ``r = n / m``, one plain step costs ``(4 r + 2) m^3`` FLOPs::

    A = X X^T                2 r m^3      symmetric
    B = b A + c A A          2 m^3        symmetric
    X <- a X + B X           2 r m^3

*Alone*, a step computes one triangle of A and B: ``(3 r + 1) m^3``.

*In a pair*, the first step is not applied to X. Its effect on the Gram matrix is, and X is
multiplied once by the product of both polynomials: ``(3 r + 5) m^3`` for two steps, which is less
than twice ``3 r + 1`` where ``r > 1``. All matrices of a pair but X are m x m polynomials of ``A``,
hence symmetric and commuting.

Why not more than two, and why the first step alone: a Gram matrix in fp32 knows squared singular
values only down to 6e-8 of the largest, and a pair lifts that noise by ``a^2``, about 16; a third
step by 16 again. And the first step cancels most where a singular value is near one
(``a + b + c`` is 0.12 for the quintic), so that what follows amplifies its rounding. Measured
errors of other groupings are in docs/performance/newton_schulz.md.
Source of iterating on the Gram matrix with restarts: gram-newton-schulz (Dao-AILab, 2026).
Differences: restarts every two steps; the identity is kept out of the accumulated polynomial.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_muloco.optim.symmetric import symmetric_product

__all__ = ["Triple", "iterate"]

Triple = tuple[float, float, float]
"""Coefficients a, b, c of one step, ``s -> a s + b s^3 + c s^5``."""

_Work = tuple[Tensor, Tensor, Tensor]


def iterate(X: Tensor, triples: Sequence[Triple], *, pairs: bool) -> Tensor:
    """Apply every step to each matrix of a batch, one matrix after the other.

    The result of a matrix does not depend on what else is in the batch.

    Args:
        X: ``[batch, m, n]``, contiguous, fp32 or fp64, m at most n; overwritten.
        triples: Coefficients of the steps.
        pairs: Take steps in pairs after the first, which pays for wide matrices.
    """
    m = X.shape[-2]
    work = (X.new_empty(m, m), X.new_empty(m, m), X.new_empty(m, m))
    groups = _grouped(triples, pairs)
    other = torch.empty_like(X)
    for here, there in zip(X.unbind(), other.unbind(), strict=True):
        for group in groups:
            if len(group) == 2:
                _step_pair(here, group[0], group[1], there, work)
            else:
                _step_alone(here, group[0], there, work)
            here, there = there, here
    return X if len(groups) % 2 == 0 else other


def _grouped(triples: Sequence[Triple], pairs: bool) -> tuple[Sequence[Triple], ...]:
    """Cut the steps into groups of one or two: the first alone, then pairs, then what is left."""
    size = 2 if pairs else 1
    return (triples[:1], *(triples[i : i + size] for i in range(1, len(triples), size)))


def _step_alone(X: Tensor, triple: Triple, out: Tensor, work: _Work) -> None:
    """Write ``a X + B X`` into ``out``."""
    a, b, c = triple
    A, B, _ = work
    symmetric_product(X, X.mT, A)
    symmetric_product(A, A, B, add=A, beta=b, alpha=c)
    torch.addmm(X, B, X, beta=a, out=out)


def _step_pair(X: Tensor, first: Triple, second: Triple, out: Tensor, work: _Work) -> None:
    """Write ``(a2 + B2)(a1 + B1) X`` into ``out``.

    The product is formed as ``a1 a2 + Z``: the multiple of the identity is applied to X by itself,
    because added to Z's diagonal it would round there.
    """
    a1, b1, c1 = first
    a2, b2, c2 = second
    A, B1, T = work
    symmetric_product(X, X.mT, A)
    symmetric_product(A, A, B1, add=A, beta=b1, alpha=c1)
    symmetric_product(A, B1, T, add=A, beta=a1)  # A (a1 + B1)
    symmetric_product(T, B1, A, add=T, beta=a1)  # A (a1 + B1)^2, the Gram matrix after one step
    B2 = T
    symmetric_product(A, A, B2, add=A, beta=b2, alpha=c2)
    Z = torch.mul(B1, a2, out=A).add_(B2, alpha=a1)
    symmetric_product(B1, B2, Z, add=Z)  # a2 B1 + a1 B2 + B1 B2
    torch.addmm(X, Z, X, beta=a1 * a2, out=out)
