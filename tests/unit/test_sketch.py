"""Sketches give the cosines of vectors that are never in one place."""

import math

import pytest
import torch

from megatron_muloco.outer.diagnostics import PseudogradientSketch, cosines, gram
from tests.support.tensors import assert_equal, integer_tensor

WIDTH = 1024
SIZES = {"a": 20_000, "b": 999, "c": 1, "d": WIDTH, "e": 30_001}


def pair(cosine: float, seed: int, sizes: dict[str, int] = SIZES) -> list[dict[str, torch.Tensor]]:
    """Return two vectors of exactly this cosine, cut into named pieces."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(sizes.values())
    x, y = torch.randn(2, total, generator=generator, dtype=torch.float64)
    y -= x * (x @ y) / (x @ x)
    y *= x.norm() / y.norm()
    second = cosine * x + math.sqrt(1 - cosine**2) * y
    pieces = (vector.float().split(list(sizes.values())) for vector in (x, second))
    return [dict(zip(sizes, tensors, strict=True)) for tensors in pieces]


def measured(sketch: PseudogradientSketch, vectors: list[dict[str, torch.Tensor]]) -> float:
    return float(cosines(gram(torch.stack([sketch(vector) for vector in vectors])))[0, 1])


@pytest.mark.parametrize("cosine", [-0.9, -0.3, 0.0, 0.5, 0.9])
def test_cosines_are_as_exact_as_correlations_of_that_many_numbers(cosine: float) -> None:
    # Thousands of values in each of 1,024 places: jointly normal, so the standard error is
    # (1 - c^2) / sqrt(1024). Five of them bound each draw, five over sqrt(40) their mean.
    error = (1 - cosine**2) / math.sqrt(WIDTH)
    sketch = PseudogradientSketch(WIDTH)
    errors = [measured(sketch, pair(cosine, seed)) - cosine for seed in range(40)]
    assert max(map(abs, errors)) <= 5 * error
    assert abs(sum(errors) / len(errors)) <= 5 * error / math.sqrt(len(errors))


def test_an_outstanding_column_does_not_spoil_the_cosine() -> None:
    """Without turning rows, all of a matrix's column would fall into one place."""
    x, y = torch.randn(2, 400, generator=torch.Generator().manual_seed(1))
    y -= x * (x @ y) / (x @ x)
    vectors = []
    for column in (x, y):
        matrix = torch.zeros(400, WIDTH)
        matrix[:, 7] = column
        vectors.append({"a": matrix.flatten()})
    # 400 values in 1,024 places share few of them, and only those err: below the usual bound.
    assert abs(measured(PseudogradientSketch(WIDTH), vectors)) <= 5 / math.sqrt(WIDTH)


def test_opposite_and_equal_vectors_are_exact() -> None:
    (vector, _) = pair(0.0, 3)
    sketch = PseudogradientSketch(64)
    opposite = {name: -tensor for name, tensor in vector.items()}
    both = cosines(gram(torch.stack([sketch(vector), sketch(vector), sketch(opposite)])))
    torch.testing.assert_close(
        both, torch.tensor([[1.0, 1, -1], [1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    )


def test_a_sketch_is_linear_and_keeps_single_values() -> None:
    sketch = PseudogradientSketch(16)
    x, y = ({"a": integer_tensor(100, seed=s), "b": integer_tensor(7, seed=s)} for s in (1, 2))
    assert_equal(sketch({name: x[name] + y[name] for name in x}), sketch(x) + sketch(y))
    assert_equal(sketch(dict(reversed(x.items()))), sketch(x))
    single = sketch({"c": torch.tensor([3.0])})
    assert single.abs().sum() == 3.0
    assert single.abs().max() == 3.0


def test_long_tensors_are_visited_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"a": integer_tensor(1000, seed=5)}
    whole = PseudogradientSketch(16)(values)
    monkeypatch.setattr("megatron_muloco.outer.diagnostics._CHUNK_ELEMENTS", 48)
    assert_equal(PseudogradientSketch(16)(values), whole)


def test_nothing_gives_no_numbers_and_nan_stays_nan() -> None:
    assert PseudogradientSketch(16)({}).numel() == 0
    assert PseudogradientSketch(16)({"a": torch.tensor([1.0, math.nan])}).isnan().any()
    products = gram(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert cosines(products)[0, 1].isnan()


def test_sketches_are_due_every_interval_of_rounds() -> None:
    sketch = PseudogradientSketch(16, interval=3)
    assert [sketch.is_due(round_index) for round_index in range(1, 7)] == [
        False, False, True, False, False, True,
    ]  # fmt: skip
