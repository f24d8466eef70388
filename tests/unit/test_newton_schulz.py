"""Newton-Schulz against singular values in float64: relation 10."""

import importlib.util
import math

import pytest
import torch
from torch import Tensor

from megatron_muloco.config.inner import CoefficientType, NSImplementation
from megatron_muloco.optim.newton_schulz import (
    NORM_EPSILON,
    coefficient_triples,
    newton_schulz,
    scale_factor,
)
from tests.support.tensors import assert_equal

SHAPES = [(8, 8), (5, 13), (13, 5), (1, 7), (7, 1), (64, 176)]
KINDS = ["gaussian", "ill-conditioned", "rank-deficient", "tiny", "huge"]


def polynomial_oracle(
    M: Tensor, coefficients: CoefficientType = "quintic", steps: int = 5
) -> Tensor:
    """U p(S / (|M|_F + eps)) V^T in float64, p applied to each singular value by itself."""
    U, S, Vh = torch.linalg.svd(M.double(), full_matrices=False)
    s = S / (M.double().norm() + NORM_EPSILON)
    for a, b, c in coefficient_triples(coefficients, steps):
        s = a * s + b * s**3 + c * s**5
    return U @ torch.diag(s) @ Vh


def matrix(kind: str, shape: tuple[int, int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    M = torch.randn(*shape, generator=generator, dtype=torch.float64)
    if kind == "ill-conditioned":  # singular values from 1 down to 1e-6
        U, _, Vh = torch.linalg.svd(M, full_matrices=False)
        M = U @ torch.diag(torch.logspace(0, -6, min(shape), dtype=torch.float64)) @ Vh
    if kind == "rank-deficient":
        M = M[:, :1] @ M[:1, :]
    return (M * {"tiny": 1e-20, "huge": 1e20}.get(kind, 1.0)).float()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def tolerance(M: Tensor) -> float:
    """Bound on the relative Frobenius error of the fp32 iteration: 1e-4, more for rank one.

    Rounding (6e-8) of the input grows by the polynomial's slope at zero, 493, to 3e-5; 1e-4 leaves
    room for the products. A matrix that is nearly of rank one has all its norm in one singular
    value and all its rounding in the others, so the products' rounding matters more, and that
    differs between processors (AVX-512 sums in longer chains than AVX2). With s = f = 1 for the
    largest singular value and the norm, and r the error of this machine's product M M^T, a step
    X' = a X + (b A + c A A) X, A = X X^T, adds at most r (|a| + 3 |b| s^2 + 5 |c| s^4): A is off by
    r s, A A by three times s^2 as much, and the last product by r of its factors. Later steps
    lift what is off by their slopes at zero.
    """
    norm = M.double().norm() + NORM_EPSILON
    s = (torch.linalg.matrix_norm(M.double(), 2) / norm).item()
    if s < 0.999:
        return 1e-4
    X = (M.double() / norm).float()
    r = relative_error(X @ X.mT, X.double() @ X.double().mT)
    error = 2.0**-24
    for a, b, c in coefficient_triples("quintic", 5):
        error = a * error + r * s * (abs(a) + 3 * abs(b) * s**2 + 5 * abs(c) * s**4)
        s = abs(a * s + b * s**3 + c * s**5)
    return max(1e-4, error / s)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_polynomial_of_singular_values(kind: str, shape: tuple[int, int]) -> None:
    M = matrix(kind, shape)
    result = newton_schulz(M, dtype=torch.float32)
    assert result.dtype == torch.float32
    assert relative_error(result, polynomial_oracle(M)) <= tolerance(M)


@pytest.mark.parametrize("kind", ["gaussian", "huge", "tiny"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bf16_equals_the_polynomial_of_singular_values(kind: str, shape: tuple[int, int]) -> None:
    M = matrix(kind, shape)
    result = newton_schulz(M, dtype=torch.bfloat16)
    assert result.dtype == torch.float32
    # Five rounded steps (2^-9 = 2e-3 each product, three products a step): about 3e-2 at most.
    assert relative_error(result, polynomial_oracle(M)) <= 3e-2


@pytest.mark.parametrize("kind", ["ill-conditioned", "rank-deficient"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bf16_keeps_large_directions_and_bounds_noise(kind: str, shape: tuple[int, int]) -> None:
    # Rounding to bf16 alone puts noise of 2e-3 into directions that M does not have, and the slope
    # 493 lifts it: there bf16 cannot equal the oracle. Directions that M has stay right.
    M = matrix(kind, shape)
    result = newton_schulz(M, dtype=torch.bfloat16).double()
    U, S, Vh = torch.linalg.svd(M.double(), full_matrices=False)
    large = S / M.double().norm() >= 0.1
    along = ((U.mT @ result) * Vh).sum(dim=1)
    expected = ((U.mT @ polynomial_oracle(M)) * Vh).sum(dim=1)
    assert (along - expected)[large].abs().max() <= 3e-2
    assert torch.linalg.svdvals(result).max() <= 1.17 * 1.03


@pytest.mark.parametrize("coefficients", ["simple", "polar_express"])
@pytest.mark.parametrize("steps", [3, 5, 9])
def test_other_coefficient_sets(coefficients: CoefficientType, steps: int) -> None:
    M = matrix("gaussian", (12, 20))
    result = newton_schulz(M, steps=steps, coefficients=coefficients, dtype=torch.float32)
    assert relative_error(result, polynomial_oracle(M, coefficients, steps)) <= 1e-4


def test_singular_values_end_between_095_and_117() -> None:
    # The promise holds for singular values of at least 3e-3 of the Frobenius norm.
    U, _, Vh = torch.linalg.svd(matrix("gaussian", (40, 60)).double(), full_matrices=False)
    S = torch.logspace(0, math.log10(4e-3), 40, dtype=torch.float64)
    M = (U @ torch.diag(S) @ Vh).float()
    assert (S / M.double().norm()).min() < 3e-3 < (S / M.double().norm())[-8]
    reached = torch.linalg.svdvals(newton_schulz(M, dtype=torch.float32).double())
    promised = reached[: int((S / M.double().norm() >= 3e-3).sum())]
    assert promised.min() >= 0.95
    assert promised.max() <= 1.17


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_zero_gives_zero(dtype: torch.dtype) -> None:
    assert_equal(newton_schulz(torch.zeros(2, 4, 6), dtype=dtype), torch.zeros(2, 4, 6))


@pytest.mark.parametrize("exponent", [-45, -38, -30, -8, 0, 18, 30, 37])
def test_no_finite_input_gives_nan(exponent: int) -> None:
    M = matrix("gaussian", (6, 10)) * 10.0**exponent
    for dtype in (torch.float32, torch.bfloat16):
        assert newton_schulz(M, dtype=dtype).isfinite().all()


@pytest.mark.parametrize("shape", [(5, 13), (13, 5)], ids=str)
def test_transposition_passes_through_bitwise(shape: tuple[int, int]) -> None:
    M = matrix("gaussian", shape)
    assert_equal(newton_schulz(M.mT, dtype=torch.float32), newton_schulz(M, dtype=torch.float32).mT)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batched_equals_single(shape: tuple[int, int]) -> None:
    batch = torch.stack([matrix("gaussian", shape, seed) for seed in range(4)]).view(2, 2, *shape)
    together = newton_schulz(batch, dtype=torch.float32)
    for i, j in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        alone = newton_schulz(batch[i, j], dtype=torch.float32)
        # Other matrix kernels may sum in another order: twice the fp32 bound against the oracle.
        assert relative_error(together[i, j], alone.double()) <= 2e-4


def test_input_is_not_modified() -> None:
    M = matrix("gaussian", (4, 6))
    before = M.clone()
    newton_schulz(M, dtype=torch.float32)
    assert_equal(M, before)


def test_scale_factors() -> None:
    # fan_out 11, fan_in 4, as the ratio 2.75 of gate and up
    assert scale_factor("unit_rms_norm", 11, 4) == math.sqrt(2.75)
    assert scale_factor("unit_rms_norm", 4, 11) == math.sqrt(4 / 11)
    assert scale_factor("shape_scaling", 11, 4) == math.sqrt(2.75)
    assert scale_factor("shape_scaling", 4, 11) == 1.0
    assert scale_factor("spectral", 4, 16) == 4.0
    assert scale_factor("match_rms", 4, 25) == 1.0


def test_match_rms_gives_an_orthogonal_update_the_rms_of_adamw() -> None:
    Q, _ = torch.linalg.qr(matrix("gaussian", (64, 16)).double())
    rms = (Q * scale_factor("match_rms", 64, 16)).square().mean().sqrt()
    assert rms.item() == pytest.approx(0.2, rel=1e-12)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'cubic' is not one of \['polar_express', 'quintic'"):
        coefficient_triples("cubic", 5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'none' is not one of"):
        scale_factor("none", 2, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one step"):
        coefficient_triples("quintic", 0)
    with pytest.raises(ValueError, match="needs matrices"):
        newton_schulz(torch.zeros(3), dtype=torch.float32)


@pytest.mark.skipif(
    importlib.util.find_spec("emerging_optimizers") is None,
    reason="emerging-optimizers is published for Python 3.12 and later only",
)
@pytest.mark.parametrize("coefficients", ["quintic", "simple", "polar_express"])
@pytest.mark.parametrize("shape", [(24, 24), (16, 44), (44, 16)], ids=str)
@pytest.mark.parametrize("impl", ["plain", "triangle", "gram"])
def test_agrees_with_emerging_optimizers(
    coefficients: CoefficientType, shape: tuple[int, int], impl: NSImplementation
) -> None:
    from emerging_optimizers.orthogonalized_optimizers.muon_utils import newton_schulz as theirs

    M = matrix("gaussian", shape)
    for steps in (5, 7):
        ours = newton_schulz(
            M, steps=steps, coefficients=coefficients, dtype=torch.float32, impl=impl
        )
        other = theirs(M, steps=steps, coefficient_type=coefficients)
        # Both are within 1e-4 of the exact polynomial.
        assert relative_error(ours, other.double()) <= 2e-4
