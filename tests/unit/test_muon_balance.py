"""The balance bench finds the best assignment, and ours is near it at the shapes that matter."""

import itertools
import sys

import pytest

from tools.bench import muon_balance


def best_by_trying(costs: tuple[int, ...], ranks: int) -> int:
    return min(
        max(
            sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank)
            for rank in range(ranks)
        )
        for owners in itertools.product(range(ranks), repeat=len(costs))
    )


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("costs", [(6,) * 5, (13, 13, 6, 6, 6), (13, 13, 13, 6, 6, 6, 6), (7, 2)])
def test_the_optimum_is_that_of_trying_everything(costs: tuple[int, ...], ranks: int) -> None:
    assert muon_balance.optimum(costs, ranks) == (best_by_trying(costs, ranks), True)


def test_with_more_costs_it_is_a_lower_bound() -> None:
    bound, exact = muon_balance.optimum((9, 5, 4, 3), 2)
    assert not exact
    assert bound <= best_by_trying((9, 5, 4, 3), 2)


def test_the_bars_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["muon_balance"])
    assert muon_balance.main() == 0
