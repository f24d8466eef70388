"""A pairwise cover of methods, replicas, layouts and precisions; `make test-matrix` runs all."""

from itertools import combinations

import pytest

from tests.support.matrix import Case, check, matrix, pairwise_cover, run_case

MAX_WORLD = 8
COVER = pairwise_cover(MAX_WORLD)


def test_the_cover_holds_every_pair() -> None:
    def pairs(cases: list[Case]) -> set[frozenset[object]]:
        return {frozenset(pair) for case in cases for pair in combinations(case.factors, 2)}

    assert pairs(COVER) == pairs([case for case in matrix() if case.world_size <= MAX_WORLD])
    assert len(matrix()) == 2 * 3 * 5 * 2 + 2 * 3 * 4 * 2


@pytest.mark.parametrize("case", COVER, ids=lambda case: case.name)
def test_a_case_trains_like_one_rank_a_replica(case: Case) -> None:
    check(case, run_case(case))
