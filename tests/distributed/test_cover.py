"""A pairwise cover of methods, replicas, layouts and precisions; `make test-matrix` runs all."""

from dataclasses import replace
from itertools import combinations

import pytest

from tests.support import matrix as support
from tests.support.matrix import Case, Outcome, check, matrix, pairwise_cover, run_case

MAX_WORLD = 8
COVER = pairwise_cover(MAX_WORLD)


def test_the_cover_holds_every_pair() -> None:
    def pairs(cases: list[Case]) -> set[frozenset[object]]:
        return {frozenset(pair) for case in cases for pair in combinations(case.factors, 2)}

    assert pairs(COVER) == pairs([case for case in matrix() if case.world_size <= MAX_WORLD])
    assert len(matrix()) == 2 * 3 * 5 * 2 + 2 * 3 * 4 * 2 + 2 * 2 * 2


@pytest.mark.parametrize("case", COVER, ids=lambda case: case.name)
def test_a_case_trains_like_one_rank_a_replica(case: Case) -> None:
    check(case, run_case(case))


CASE = Case("diloco", 2, 1, 1, 2, "fp32")
RIGHT = [Outcome((r, 0, d, 0, 0), [4.0 - r, 3.0], {"w": "digest"}) for r in (0, 1) for d in (0, 1)]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"losses": [4.0, 3.001]}, "replica 0 has loss 3.001 at step 2, one rank a replica had"),
        ({"losses": [float("nan"), 3.0]}, "loss nan at step 1"),
        ({"digests": {"w": "another"}}, "copies of w differ"),
    ],
)
def test_a_case_that_is_wrong_is_named(
    wrong: dict[str, object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    references = {0: [4.0, 3.0], 1: [3.0, 3.0]}
    monkeypatch.setattr(support, "reference_losses", lambda case: references)
    assert check(CASE, RIGHT) == 0.0
    with pytest.raises(AssertionError, match=f"diloco-k2-tp1-pp1-dp2-fp32: .*{words}"):
        check(CASE, [RIGHT[0], replace(RIGHT[1], **wrong), *RIGHT[2:]])
