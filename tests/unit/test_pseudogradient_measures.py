"""Measures of pseudogradients on constructed cases whose values follow from algebra."""

import math

import pytest
import torch
from torch import Tensor

from tools.pseudogradient.layers import measure_layers, muon_scale
from tools.pseudogradient.measures import (
    autocorrelation,
    cosine,
    decompose,
    interference_gap,
    mean_of,
    outer_rounds,
    pairwise_cosines,
    spectrum,
)

# Sums of at most 16 products of fp64 numbers of size 1, and square roots: a few ulps.
EXACT = 1e-14


def units(count: int, size: int = 16) -> list[Tensor]:
    """Return orthogonal matrices of rank one: row k holds a one in column k."""
    found = []
    for index in range(count):
        matrix = torch.zeros(size, size)
        matrix[index, index] = 1.0
        found.append(matrix)
    return found


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("count", [2, 4, 8, 16])
def test_the_mean_of_orthogonal_replicas_has_cosine_one_over_root_k(count: int) -> None:
    replicas = units(count)
    mean = mean_of(replicas)
    assert cosine(mean, replicas[0]) == pytest.approx(1 / math.sqrt(count), abs=EXACT)
    assert pairwise_cosines(replicas) == [0.0] * (count * (count - 1) // 2)
    # The K singular values of the mean are all 1/K; the largest of a replica is 1.
    assert interference_gap(replicas) == pytest.approx(100 * (1 - 1 / count), abs=100 * EXACT)
    assert spectrum(mean)[:count].tolist() == pytest.approx([1 / count] * count, abs=EXACT)


def test_equal_replicas_lose_nothing() -> None:
    replicas = [random(6, 4)] * 3
    assert cosine(mean_of(replicas), replicas[0]) == pytest.approx(1, abs=EXACT)
    assert pairwise_cosines(replicas) == pytest.approx([1.0] * 3, abs=EXACT)
    assert interference_gap(replicas) == pytest.approx(0, abs=100 * EXACT)


def test_opposite_replicas_lose_everything() -> None:
    replica = random(6, 4)
    assert cosine(replica, -replica) == pytest.approx(-1, abs=EXACT)
    assert interference_gap([replica, -replica]) == 100


def test_a_zero_has_no_direction() -> None:
    zero = torch.zeros(3, 3)
    assert math.isnan(cosine(zero, torch.ones(3, 3)))
    assert math.isnan(interference_gap([zero, zero]))


def test_the_gap_takes_a_twentieth_of_the_singular_values_rounded_up() -> None:
    # 40 values, so two of them: replicas agree in the first and are opposite in the second.
    diagonal = torch.zeros(40)
    diagonal[0], diagonal[1] = 3.0, 1.0
    other = diagonal.clone()
    other[1] = -1.0
    gap = interference_gap([torch.diag(diagonal), torch.diag(other)])
    assert gap == pytest.approx(100 * (1 - 3 / 4), abs=100 * EXACT)


def test_the_spectrum_of_rank_one_is_a_product_of_norms() -> None:
    left, right = random(6), random(4, seed=1)
    values = spectrum(torch.outer(left, right))
    assert float(values[0]) == pytest.approx(float(left.norm() * right.norm()), rel=EXACT)
    assert values[1:].abs().max() <= EXACT * values[0]


# ---- the decomposition of the nuclear norm ---------------------------------------------------


def test_the_nuclear_norm_is_the_sum_over_replicas_and_steps() -> None:
    steps = [[random(7, 5, seed=10 * k + t) for t in range(6)] for k in range(4)]
    parts = decompose(steps)
    mean = mean_of([torch.stack(replica).sum(0) for replica in steps])
    assert parts.rank == 5
    assert parts.nuclear == pytest.approx(float(spectrum(mean).sum()), rel=EXACT)
    # 24 matrices of 35 elements: sums of 840 products, each within an ulp of size |step|.
    assert parts.from_steps == pytest.approx(parts.nuclear, rel=840 * 2.3e-16)
    assert parts.alignment.abs().max() <= 1


def test_orthonormal_steps_need_only_rates_and_alignment() -> None:
    rates = [0.1, 0.2, 0.4]
    steps = []
    for replica in range(2):
        own = []
        for t, rate in enumerate(rates):
            left, _, right = torch.linalg.svd(random(8, 4, seed=9 * replica + t))
            own.append(rate * left[:, :4] @ right)
        steps.append(own)
    parts = decompose(steps)
    assert parts.rank == 4
    assert parts.from_rates(rates) == pytest.approx(parts.nuclear, rel=100 * EXACT)
    assert parts.norms[0].tolist() == pytest.approx([2 * rate for rate in rates], rel=EXACT)


def test_equal_orthonormal_steps_are_aligned_and_have_equal_norms() -> None:
    step = torch.eye(4, dtype=torch.float64)
    parts = decompose([[step] * 3] * 2)
    assert parts.nuclear == pytest.approx(12, rel=EXACT)
    assert parts.alignment.flatten().tolist() == pytest.approx([1.0] * 6, rel=EXACT)
    assert parts.norm_spread == 0


def test_a_step_of_zero_has_no_part_in_the_norm() -> None:
    step = torch.eye(4, dtype=torch.float64)
    parts = decompose([[step, torch.zeros(4, 4)]])
    assert parts.alignment.tolist() == [[pytest.approx(1, rel=EXACT), 0.0]]
    assert parts.from_steps == pytest.approx(parts.nuclear, rel=EXACT)


# ---- the outer optimizer ---------------------------------------------------------------------


def test_equal_pseudogradients_reach_the_gain_of_a_geometric_series() -> None:
    lr, momentum, count = 0.9, 0.8, 60
    rounds, _ = outer_rounds([torch.ones(5)] * count, [lr] * count, [momentum] * count)
    # u = (1 - mu^r) / (1 - mu) D after round r.
    for each in rounds:
        u = (1 - momentum**each.round_index) / (1 - momentum)
        assert each.aligned_gain == pytest.approx(lr * (1 + momentum * u), rel=1e-12)
        assert each.transverse_ratio == pytest.approx(0, abs=1e-7)  # root of one ulp
    # What is missing is mu^60 of the gain.
    assert rounds[-1].aligned_gain == pytest.approx(lr / (1 - momentum), rel=momentum**count * 2)


def test_orthogonal_pseudogradients_only_add_across() -> None:
    means = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])]
    rounds, momenta = outer_rounds(means, [1.0, 1.0], [0.5, 0.5])
    assert momenta[1].tolist() == [0.5, 1.0]
    # w = D + u / 2 = (0.25, 1.5): 1.5 along D, 0.25 across.
    assert (rounds[1].aligned_gain, rounds[1].transverse_ratio) == (1.5, 0.25 / 1.5)


def test_plain_averaging_has_gain_one() -> None:
    rounds, _ = outer_rounds([random(4), random(4, seed=1)], [1.0, 1.0], [0.0, 0.0])
    assert [each.aligned_gain for each in rounds] == pytest.approx([1.0, 1.0], rel=EXACT)
    assert [each.transverse_ratio for each in rounds] == pytest.approx([0.0, 0.0], abs=EXACT)


def test_autocorrelation_finds_the_period() -> None:
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    vectors = [first, second] * 3
    assert [autocorrelation(vectors, lag) for lag in (1, 2, 3)] == [0.0, 1.0, 0.0]
    assert math.isnan(autocorrelation(vectors, 6))


# ---- measures by matrix ----------------------------------------------------------------------


def test_a_single_replica_is_its_own_reference() -> None:
    own = {"a": random(6, 4), "b": random(3, 3)}
    layers = measure_layers([own], own)
    assert [each.matrix for each in layers] == ["a", "b"]
    for each in layers:
        assert each.cosine == pytest.approx(1, abs=EXACT)
        assert (each.pairwise_mean, each.alignment) == (None, None)
        assert each.nuclear_mean == pytest.approx(each.nuclear_replica, rel=EXACT)


def test_measures_of_a_matrix_are_those_of_its_replicas() -> None:
    replicas = [{"a": each} for each in units(4)]
    (layer,) = measure_layers(replicas, {"a": replicas[0]["a"]}, [[each] for each in replicas])
    assert layer.cosine == pytest.approx(0.5, abs=EXACT)
    assert (layer.top_replica, layer.top_mean) == (1.0, 0.25)
    assert layer.nuclear_mean == pytest.approx(1, rel=EXACT)
    # Each replica's step is one of the four directions of Q: rho = 1 / sqrt(4).
    assert layer.alignment == pytest.approx(0.5, abs=EXACT)
    assert layer.from_steps == pytest.approx(layer.nuclear_mean, rel=EXACT)
    assert layer.rates_ratio is None


def test_muons_scale_is_the_root_of_the_aspect() -> None:
    assert muon_scale(torch.zeros(8, 2)) == 2.0
