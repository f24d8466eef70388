"""Newton-Schulz iteration: moves the singular values of a matrix towards one by matrix products.

For ``M = U S V^T`` every step maps the singular values through the odd polynomial
``s -> a s + b s^3 + c s^5``, so the result is ``U p(S) V^T`` with p the composition of all steps;
no decomposition is computed. Products are formed on the smaller side, the side of the Gram matrix
``X X^T``.

`newton_schulz` is the function to call. `_iterate_plain` is the algorithm as published; `iterate`
has the same steps with fewer multiplications; `choose` decides between them. `scale_factor` is the
factor that Muon multiplies the result by.

Shapes: ``...`` batch, m rows (fan_out), n columns (fan_in); inside the iterations m is at most n.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from megatron_muloco.config.inner import CoefficientType, NSImplementation, ScaleMode
from megatron_muloco.optim.matrices import automatic_implementation

__all__ = [
    "NORM_EPSILON",
    "Triple",
    "choose",
    "coefficient_triples",
    "iterate",
    "newton_schulz",
    "scale_factor",
    "symmetric_product",
]

Triple = tuple[float, float, float]
"""Coefficients a, b, c of one step, ``s -> a s + b s^3 + c s^5``."""

NORM_EPSILON = 1e-8  # added to the Frobenius norm; value of the MuLoCo paper's code

_TRIPLES: Mapping[CoefficientType, tuple[Triple, ...]] = {
    # Five tuned steps, the MuLoCo paper's choice. Source: F. L. Cesista et al., "Squeezing 1-2 %
    # efficiency gains out of Muon by optimizing the Newton-Schulz coefficients" (2025).
    "quintic": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    # One triple for every step. Source: K. Jordan, "Muon: an optimizer for hidden layers" (2024).
    "simple": ((3.4445, -4.7750, 2.0315),),
    # Source: Polar Express, arXiv:2505.16932, Algorithm 1; its safety factor 1.01 is divided in
    # (a/1.01, b/1.01^3, c/1.01^5 except in the last triple); rounded to four decimals.
    "polar_express": (
        (8.2051, -22.9019, 16.4607),
        (4.0664, -2.8612, 0.5184),
        (3.9096, -2.8234, 0.5250),
        (3.2856, -2.4153, 0.4853),
        (2.2779, -1.6198, 0.3985),
        (1.8726, -1.2307, 0.3585),
        (1.8564, -1.2132, 0.3568),
        (1.8750, -1.2500, 0.3750),
    ),
}


def coefficient_triples(coefficients: CoefficientType, steps: int) -> tuple[Triple, ...]:
    """Return the ``(a, b, c)`` of each of ``steps`` steps.

    With more steps than a set has triples, ``quintic`` starts over and the others repeat their
    last triple, as Emerging-Optimizers does.

    Raises:
        ValueError: Unknown set, or fewer than one step.
    """
    if coefficients not in _TRIPLES:
        raise ValueError(f"coefficient set {coefficients!r} is not one of {sorted(_TRIPLES)}")
    if steps < 1:
        raise ValueError(f"Newton-Schulz needs at least one step, not {steps}")
    triples = _TRIPLES[coefficients]
    if coefficients == "quintic":
        return tuple(triples[i % len(triples)] for i in range(steps))
    return tuple(triples[min(i, len(triples) - 1)] for i in range(steps))


def choose(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> NSImplementation:
    """Return the implementation that ``impl="auto"`` runs for this shape, dtype and device.

    The rules are those of `automatic_implementation`.
    """
    precise = dtype in (torch.float32, torch.float64)
    return automatic_implementation(rows, columns, precise=precise, cpu=device.type == "cpu")


def newton_schulz(
    M: Tensor,
    *,
    steps: int = 5,
    coefficients: CoefficientType = "quintic",
    dtype: torch.dtype,
    eps: float = NORM_EPSILON,
    impl: Literal["auto"] | NSImplementation = "auto",
) -> Tensor:
    """Return ``U p(S) V^T`` for each matrix ``U S V^T / (|M|_F + eps)`` of a batch.

    A zero matrix gives zero, and no finite input gives NaN. Singular values below about 3e-3 of
    the Frobenius norm do not reach one in five steps.

    Args:
        M: ``[..., m, n]``, any float dtype; not modified.
        steps: Number of polynomial steps.
        coefficients: Which polynomials.
        dtype: Dtype of the iteration, ``torch.float32`` or ``torch.bfloat16``.
        eps: Added to the Frobenius norm.
        impl: How the steps are computed; ``auto`` lets `choose` decide. All agree within rounding.

    Raises:
        ValueError: Not a matrix; unknown ``coefficients`` or ``impl``; an ``impl`` that
            cannot run, or not accurately, in ``dtype`` on this device.

    Dtypes: the norm is accumulated in float64 and the division done in fp32; iterated in ``dtype``;
    returned in fp32.
    Source: K. Jordan, "Muon" (2024). Difference: that code casts to bf16 before it divides.
    """
    if M.ndim < 2:
        raise ValueError(f"Newton-Schulz needs matrices, not a tensor of shape {tuple(M.shape)}")
    # Squares of fp32 entries of 1e30 or 1e-30 overflow or vanish in fp32, and do not in float64.
    norm = torch.linalg.vector_norm(M, dim=(-2, -1), keepdim=True, dtype=torch.float64)
    X = (M.to(torch.float32) / (norm + eps).to(torch.float32)).to(dtype)
    tall = M.shape[-2] > M.shape[-1]
    X = X.mT if tall else X
    # One contiguous batch: matrix kernels differ in bits between row-major and transposed operands,
    # and a matrix must give the same bits however it was stored.
    X = X.reshape(-1, *X.shape[-2:]).contiguous()
    triples = coefficient_triples(coefficients, steps)
    if impl == "auto":
        impl = choose(M.shape[-2], M.shape[-1], dtype, M.device)
    if impl == "plain":
        X = _iterate_plain(X, triples)
    else:
        _check_implementation(impl, dtype)
        X = iterate(X, triples, pairs=impl == "gram")
    result: Tensor = X.mT if tall else X
    return result.reshape(M.shape).to(torch.float32).contiguous()


def _check_implementation(impl: NSImplementation, dtype: torch.dtype) -> None:
    if impl not in ("triangle", "gram"):
        raise ValueError(f"impl {impl!r} is not 'auto', 'plain', 'triangle' or 'gram'")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"impl {impl!r} iterates in fp32 or fp64, not {dtype}: a Gram matrix in a shorter "
            "dtype loses small singular values. Use impl 'auto' or 'plain'."
        )


# ---- factors on the orthogonalised update --------------------------------------------------------


def _unit_rms_norm(fan_out: int, fan_in: int) -> float:
    """Keep the RMS of activations. Source: arXiv:2310.17813 (spectral condition); MuLoCo's code."""
    return math.sqrt(fan_out / fan_in)


def _spectral(fan_out: int, fan_in: int) -> float:
    """Source: ``spectral`` of Megatron-core; arXiv:2502.16982 without its factor 0.2."""
    return math.sqrt(max(fan_out, fan_in))


def _shape_scaling(fan_out: int, fan_in: int) -> float:
    """Source: K. Jordan's reference implementation of Muon (2024)."""
    return math.sqrt(max(1.0, fan_out / fan_in))


def _match_rms(fan_out: int, fan_in: int) -> float:
    """Give updates the RMS of AdamW's. Source: Moonlight, arXiv:2502.16982, section 2.2."""
    return 0.2 * math.sqrt(max(fan_out, fan_in))


_SCALES: Mapping[ScaleMode, Callable[[int, int], float]] = {
    "unit_rms_norm": _unit_rms_norm,
    "spectral": _spectral,
    "shape_scaling": _shape_scaling,
    "match_rms": _match_rms,
}


def scale_factor(mode: ScaleMode, fan_out: int, fan_in: int) -> float:
    """Return the factor on the orthogonalised update of a ``[fan_out, fan_in]`` matrix.

    Raises:
        ValueError: Unknown mode.
    """
    if mode not in _SCALES:
        raise ValueError(f"scale mode {mode!r} is not one of {sorted(_SCALES)}")
    return _SCALES[mode](fan_out, fan_in)


# ---- iterations ----------------------------------------------------------------------------------


def _iterate_plain(X: Tensor, triples: Sequence[Triple]) -> Tensor:
    """Apply every step to ``[batch, m, n]``, m at most n; a step has three products.

    ``baddbmm`` rounds ``b A + c A A`` and ``a X + B X`` once instead of twice, which matters in
    bf16.
    """
    for a, b, c in triples:
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A A
        X = torch.baddbmm(X, B, X, beta=a)  # a X + B X
    return X


_Work = tuple[Tensor, Tensor, Tensor]


def iterate(X: Tensor, triples: Sequence[Triple], *, pairs: bool) -> Tensor:
    """Apply every step to each matrix of a batch with fewer multiplications than `_iterate_plain`.

    Symmetric products are computed by halves, and steps optionally in pairs. With ``r = n / m``,
    one plain step costs ``(4 r + 2) m^3`` FLOPs::

        A = X X^T                2 r m^3      symmetric
        B = b A + c A A          2 m^3        symmetric
        X <- a X + B X           2 r m^3

    A single step that computes one triangle of A and of B costs ``(3 r + 1) m^3``. In a pair, the
    first step is not applied to X but to the Gram matrix A, and X is multiplied once by the product
    of both polynomials: ``(3 r + 5) m^3`` for two steps, less than twice ``3 r + 1`` where
    ``r > 1``. All matrices of a pair but X are m x m polynomials of A, hence symmetric and
    commuting.

    Not more than two steps together, because a Gram matrix in fp32 holds squared singular values
    only down to 6e-8 of the largest, a pair amplifies that error by ``a^2``, about 16, and a third
    step would do so by 16 again. The first step is never in a pair, because it cancels most where a
    singular value is near one (``a + b + c`` is 0.12 for the quintic), and the steps after it
    amplify its rounding. Measured errors of other groupings: docs/performance/newton_schulz.md.

    Matrices are computed one after the other, so the result of a matrix does not depend on what
    else is in the batch.

    Args:
        X: ``[batch, m, n]``, contiguous, fp32 or fp64, m at most n; overwritten.
        triples: Coefficients of the steps.
        pairs: Take steps in pairs after the first, which is faster for wide matrices.

    Source: gram-newton-schulz (Dao-AILab, 2026) for iterating on the Gram matrix with restarts.
    Differences: a restart every two steps; the identity is kept out of the accumulated polynomial.
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
    # Each group writes into the other buffer, so their number tells where the result is.
    return X if len(groups) % 2 == 0 else other


def _grouped(triples: Sequence[Triple], pairs: bool) -> tuple[Sequence[Triple], ...]:
    """Return groups of one or two steps: the first alone, then pairs, then what is left."""
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

    The product is formed as ``a1 a2 + Z``. The multiple of the identity, about 16, is applied to X
    separately: added to Z's diagonal it would round the small entries there.
    """
    a1, b1, c1 = first
    a2, b2, c2 = second
    A, B1, T = work
    symmetric_product(X, X.mT, A)
    symmetric_product(A, A, B1, add=A, beta=b1, alpha=c1)
    symmetric_product(A, B1, T, add=A, beta=a1)  # A (a1 + B1)
    symmetric_product(T, B1, A, add=T, beta=a1)  # A (a1 + B1)^2, the Gram matrix after one step
    B2 = T  # in T's memory, which no later product reads
    symmetric_product(A, A, B2, add=A, beta=b2, alpha=c2)
    Z = torch.mul(B1, a2, out=A).add_(B2, alpha=a1)
    symmetric_product(B1, B2, Z, add=Z)  # a2 B1 + a1 B2 + B1 B2
    torch.addmm(X, Z, X, beta=a1 * a2, out=out)


# ---- symmetric products --------------------------------------------------------------------------

# A block on the diagonal is computed whole, though half of it would do. With an eighth of the rows
# that wastes a sixteenth of the full product. Below 128 rows, kernels lose more of their rate than
# the triangle saves. Measured: docs/performance/newton_schulz.md.
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
    """Write ``beta add + alpha left right`` into ``out``, computing the lower triangle only.

    ``X X^T`` is symmetric, and so is the product of two polynomials of one symmetric matrix,
    because they commute. The triangle is cut recursively into square blocks below the diagonal,
    each as large as possible, and small blocks on it: large blocks run matrix kernels at their full
    rate.

    The caller must ensure that the product and ``add`` are symmetric; this is not checked. Outside
    the blocks on its diagonal the result is symmetric bit for bit.

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
    """Return blocks that cover every element on and below the diagonal of ``[start, stop)``."""
    if stop - start <= diagonal_rows:
        whole = slice(start, stop)
        return ((whole, whole),)
    middle = (start + stop) // 2
    return (
        *_lower_blocks(start, middle, diagonal_rows),
        *_lower_blocks(middle, stop, diagonal_rows),
        (slice(middle, stop), slice(start, middle)),
    )
