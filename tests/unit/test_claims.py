"""Verdicts on the papers' claims, from losses made for them."""

import math

import pytest

from tools.sweeps.claims import Evidence, Key, Quantity, Seeds, claims_of

SEEDS = (1, 2, 3)
NOISE = {1: 0.0, 2: 0.002, 3: -0.002}
BATCH = "training.global_batch_size"


def seeds_of(loss: float) -> Seeds:
    """Return a loss with noise that all runs of a seed share, so that differences have none."""
    return {seed: loss * (1 + NOISE[seed]) for seed in SEEDS}


def key(method: str, replicas: int = 1, variant: str = "", **over: int) -> Key:
    return ("s", method, replicas, variant, tuple((BATCH, value) for value in over.values()))


def quantities(
    found: dict[Key, Seeds], letter: str, **best: dict[tuple[str, int], Seeds]
) -> list[Quantity]:
    claims = claims_of(Evidence(found, **best))
    return list(next(claim for claim in claims if claim.letter == letter).quantities)


@pytest.mark.parametrize(
    ("samples", "verdict"),
    [
        ([-1.0, -1.1, -0.9], "shown"),
        ([-1.0, -3.0, 1.0], "in the mean only"),
        ([1.0, 3.0, -1.0], "not shown"),
        ([1.0, 1.1, 0.9], "contradicted"),
        ([-1.0], "one seed"),
    ],
)
def test_a_verdict_says_where_the_interval_lies(samples: list[float], verdict: str) -> None:
    assert Quantity("q", dict(enumerate(samples)), "%").verdict == verdict


def test_noise_that_a_seed_shares_cancels() -> None:
    found = {key("muloco", 2): seeds_of(2.0), key("diloco", 2): seeds_of(2.1)}
    (below,) = quantities(found, "a")
    assert below.interval.mean == pytest.approx(100 * (2.0 / 2.1 - 1), rel=1e-12)
    # The noise is a common factor: what is left is rounding.
    assert below.interval.half_width < 1e-10
    assert below.verdict == "shown"


def test_growth_is_the_slope_of_the_gap_per_doubling() -> None:
    found: dict[Key, Seeds] = {key("dp_muon"): seeds_of(2.0), key("dp_adamw"): seeds_of(3.0)}
    for k in (2, 4, 8):
        found[key("muloco", k)] = seeds_of(2.0 * (1 + 0.01 * math.log2(k)))
        found[key("diloco", k)] = seeds_of(3.0 * (1 + 0.03 * math.log2(k)))
    (growth,) = quantities(found, "b")
    assert growth.interval.mean == pytest.approx(1.0 - 3.0, rel=1e-9)


def test_codecs_are_compared_with_the_plain_run_of_the_same_method() -> None:
    found = {
        key("muloco", 4): seeds_of(2.0),
        key("muloco", 4, "4-bit"): seeds_of(2.004),
        key("muloco", 4, "streaming"): seeds_of(2.04),
    }
    four, streaming = quantities(found, "e")
    assert (four.verdict, streaming.verdict) == ("shown", "contradicted")


def test_the_critical_batch_is_where_the_loss_leaves_one_percent() -> None:
    # AdamW: 1 % above at batch 32 exactly. Muon: half-way between 64 (0.5 %) and 128 (1.5 %).
    adamw = {16: 2.0, 32: 2.02, 64: 2.2}
    muloco = {16: 2.0, 32: 2.001, 64: 2.01, 128: 2.03}
    found: dict[Key, Seeds] = {}
    for method, curve in (("dp_adamw", adamw), ("muloco", muloco)):
        for batch, loss in curve.items():
            found[key(method, batch=batch)] = dict.fromkeys(SEEDS, loss)
    (critical,) = quantities(found, "f")
    assert critical.interval.mean == pytest.approx(5.0 - 6.5, abs=1e-9)
    assert critical.verdict == "shown"


def test_the_outer_rate_is_compared_between_smallest_and_largest_k() -> None:
    best = {("muloco", 1): {1: -1.0, 2: -1.0}, ("muloco", 8): {1: 0.0, 2: 0.1}}
    (outer,) = quantities({}, "g", outer_lr=best)
    assert outer.interval.mean == pytest.approx(-1.05)


def test_claims_without_runs_have_no_quantities() -> None:
    assert all(not claim.quantities for claim in claims_of(Evidence({})))
