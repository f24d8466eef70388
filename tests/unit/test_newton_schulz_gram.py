"""Newton-Schulz by triangles and in pairs: the same polynomial, the same error, fewer products."""

from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megatron_muloco.config.inner import CoefficientType
from megatron_muloco.optim.newton_schulz import (
    choose,
    coefficient_triples,
    iterate,
    newton_schulz,
    symmetric_product,
)
from tests.support.tensors import assert_equal, integer_tensor
from tests.unit.test_newton_schulz import matrix, polynomial_oracle, relative_error, tolerance

Fast = Literal["triangle", "gram"]
FAST: tuple[Fast, ...] = ("triangle", "gram")
# 260 and 301 rows are cut into several blocks, 301 unevenly; 5 rows are one block
SHAPES = [(5, 13), (260, 260), (301, 827), (827, 301)]
CPU = torch.device("cpu")


def singular_values(*, large: int, small: float, size: int = 260) -> Tensor:
    """A ``[size, 2 size]`` matrix with ``large`` singular values of 1 and the others ``small``."""
    S = torch.full((size,), small, dtype=torch.float64)
    S[:large] = 1.0
    U, _, Vh = torch.linalg.svd(matrix("gaussian", (size, 2 * size)).double(), full_matrices=False)
    return (U @ torch.diag(S) @ Vh).float()


HARD = {
    # What breaks a Gram matrix: values below its rounding beside values of one.
    "one large": lambda: singular_values(large=1, small=1e-5),
    "one large, small at the edge": lambda: singular_values(large=1, small=3e-4),
    "half large": lambda: singular_values(large=130, small=1e-3),
    "half tiny": lambda: singular_values(large=130, small=1e-4),
    "repeated rows": lambda: matrix("gaussian", (33, 520)).repeat(8, 1),
    "nearly rank one": lambda: torch.ones(260, 520) + 1e-4 * matrix("gaussian", (260, 520)),
}


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("kind", ["gaussian", "ill-conditioned", "rank-deficient", "tiny", "huge"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_polynomial_of_singular_values(
    kind: str, shape: tuple[int, int], impl: Fast
) -> None:
    M = matrix(kind, shape)
    result = newton_schulz(M, dtype=torch.float32, impl=impl)
    assert relative_error(result, polynomial_oracle(M)) <= tolerance(M)  # the plain one's


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("kind", HARD)
def test_hard_spectra_keep_the_bound(kind: str, impl: Fast) -> None:
    M = HARD[kind]()
    result = newton_schulz(M, dtype=torch.float32, impl=impl)
    assert relative_error(result, polynomial_oracle(M)) <= tolerance(M)


@pytest.mark.parametrize("kind", ["half large", "half tiny", "repeated rows"])
def test_without_restarts_hard_spectra_would_not_keep_the_plain_error(kind: str) -> None:
    # Why pairs, and why a pair is the limit: one Gram matrix for five steps is far off.
    M = HARD[kind]()
    expected = polynomial_oracle(M)
    X = M / M.norm()
    A = X @ X.mT
    Q = torch.eye(len(A))
    for a, b, c in coefficient_triples("quintic", 5):
        P = a * torch.eye(len(A)) + b * A + c * A @ A
        Q, A = Q @ P, P @ A @ P
    never_restarted = relative_error(Q @ X, expected)
    ours = relative_error(newton_schulz(M, dtype=torch.float32, impl="gram"), expected)
    assert ours * 5 < never_restarted


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("coefficients", ["quintic", "simple", "polar_express"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 8])
def test_any_number_of_steps(coefficients: CoefficientType, steps: int, impl: Fast) -> None:
    M = matrix("gaussian", (40, 60))
    result = newton_schulz(
        M, steps=steps, coefficients=coefficients, dtype=torch.float32, impl=impl
    )
    assert relative_error(result, polynomial_oracle(M, coefficients, steps)) <= 1e-4


@pytest.mark.parametrize("impl", FAST)
def test_zero_and_extreme_matrices_give_no_nan(impl: Fast) -> None:
    assert_equal(
        newton_schulz(torch.zeros(2, 4, 6), dtype=torch.float32, impl=impl), torch.zeros(2, 4, 6)
    )
    for exponent in (-45, -38, -30, -8, 0, 18, 30, 37):
        M = matrix("gaussian", (6, 10)) * 10.0**exponent
        assert newton_schulz(M, dtype=torch.float32, impl=impl).isfinite().all()


@pytest.mark.parametrize("impl", FAST)
def test_a_matrix_has_the_same_bits_in_any_batch_and_orientation(impl: Fast) -> None:
    batch = torch.stack([matrix("gaussian", (150, 200), seed) for seed in range(3)])
    before = batch.clone()
    together = newton_schulz(batch, dtype=torch.float32, impl=impl)
    assert_equal(batch, before)
    for i in range(3):
        assert_equal(together[i], newton_schulz(batch[i], dtype=torch.float32, impl=impl))
        transposed = newton_schulz(batch[i].mT, dtype=torch.float32, impl=impl)
        assert_equal(together[i], transposed.mT)


@pytest.mark.parametrize("size", [1, 7, 128, 129, 300, 1100])
def test_symmetric_product_is_exact_on_integers(size: int) -> None:
    X = integer_tensor(size, 9, seed=0, low=-3, high=3)
    A = X @ X.mT
    out = torch.full((size, size), torch.nan)
    symmetric_product(X, X.mT, out)
    assert_equal(out, A)
    symmetric_product(X, X.mT, out, add=A, beta=3.0, alpha=-2.0)
    assert_equal(out, A)
    symmetric_product(X, X.mT, out, add=out, alpha=-1.0)  # in place
    assert_equal(out, torch.zeros(size, size))


@pytest.mark.parametrize("impl", FAST)
def test_flops_are_those_of_the_docstring(impl: Fast) -> None:
    m, r = 1024, 2
    X = torch.empty(1, m, r * m, device="meta")
    with FlopCounterMode(display=False) as counter:
        iterate(X, coefficient_triples("quintic", 5), pairs=impl == "gram")
    floor = (3 * r + 1) + 2 * (3 * r + 5) if impl == "gram" else 5 * (3 * r + 1)
    # Diagonal blocks are computed whole: at most an eighth more than the triangle.
    assert floor <= counter.get_total_flops() / m**3 <= floor * 9 / 8


def test_auto_chooses_by_shape_dtype_and_device() -> None:
    assert choose(1024, 1024, torch.float32, CPU) == "triangle"
    assert choose(1024, 2816, torch.float32, CPU) == "gram"
    assert choose(2816, 1024, torch.float32, CPU) == "gram"
    assert choose(2816, 1024, torch.bfloat16, CPU) == "plain"
    assert choose(64, 4096, torch.float32, CPU) == "plain"
    assert choose(2048, 2048, torch.float32, torch.device("cuda")) == "plain"


def test_impossible_implementations_are_refused() -> None:
    M = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="loses small singular values"):
        newton_schulz(M, dtype=torch.bfloat16, impl="gram")
    with pytest.raises(ValueError, match="'fast' is not 'auto'"):
        newton_schulz(M, dtype=torch.float32, impl="fast")  # type: ignore[arg-type]
