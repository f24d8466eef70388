"""Which steps a replica skips or loses: medians of its own last steps, kept in checkpoints."""

import json
import math
from typing import Any

import pytest

from megatron_muloco.config.schema import SpikesConfig
from megatron_muloco.training.spikes import RunningMedian, SkipLimit, SpikeWatch


def watch(**keys: Any) -> SpikeWatch:
    return SpikeWatch(SpikesConfig(**{"window": 4, "patience": 2, **keys}))


def test_the_median_is_of_the_last_finite_values() -> None:
    median = RunningMedian(3)
    for value in (9.0, 1.0, math.nan, 2.0, math.inf, 3.0):
        median.add(value)
    assert median.values == [1.0, 2.0, 3.0]
    assert not median.exceeded_by(4.0, 2.0)  # above, not at
    assert median.exceeded_by(4.5, 2.0)


def test_a_norm_is_a_spike_only_once_the_window_is_full() -> None:
    spikes = watch(max_norm_ratio=3.0)
    assert [spikes.is_spike(norm) for norm in (1.0, 50.0, 1.0, 1.0)] == [False] * 4
    assert [spikes.is_spike(norm) for norm in (3.0, 3.5, 1.0)] == [False, True, False]


def test_a_norm_that_is_not_finite_is_left_to_the_other_rule() -> None:
    spikes = watch(max_norm_ratio=3.0)
    for _ in range(4):
        spikes.is_spike(1.0)
    assert not spikes.is_spike(math.nan)
    assert spikes.state_dict()["norms"] == [1.0] * 4


def test_a_lasting_change_is_accepted_after_half_a_window() -> None:
    spikes = watch(max_norm_ratio=3.0)
    for _ in range(4):
        spikes.is_spike(1.0)
    # The lower of two middle values: after three of four the window's median is 100.
    assert [spikes.is_spike(100.0) for _ in range(5)] == [True, True, True, False, False]


def test_the_anchor_is_asked_for_after_enough_high_losses_in_a_row() -> None:
    spikes = watch(max_loss_ratio=2.0)
    for _ in range(4):
        assert not spikes.asks_for_anchor(1.0)
    high, fine = 3.0, 1.0
    asked = [spikes.asks_for_anchor(loss) for loss in (high, fine, high, math.nan, fine, high)]
    assert asked == [False, False, False, True, False, False]


@pytest.mark.parametrize("ratio", ["max_norm_ratio", "max_loss_ratio"])
def test_the_state_survives(ratio: str) -> None:
    values = (1.0, 1.1, 0.1 + 0.2, 1.3, 4.0, 1.0, 5.0, 6.0, 7.0, 1.0)

    def judged(spikes: SpikeWatch, value: float) -> bool:
        return (
            spikes.is_spike(value) if ratio == "max_norm_ratio" else spikes.asks_for_anchor(value)
        )

    undisturbed = watch(**{ratio: 2.0})
    expected = [judged(undisturbed, value) for value in values]
    assert any(expected)
    for stop in range(len(values)):
        first, resumed = watch(**{ratio: 2.0}), watch(**{ratio: 2.0})
        found = [judged(first, value) for value in values[:stop]]
        resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert found + [judged(resumed, value) for value in values[stop:]] == expected


def test_off_it_judges_and_keeps_nothing() -> None:
    spikes = watch()
    for value in (1.0, 1.0, 1.0, 1.0, 1e9, 1e9):
        assert not spikes.is_spike(value)
        assert not spikes.asks_for_anchor(value)
    assert spikes.state_dict() == {"norms": [], "losses": [], "high_losses": 0}


def test_skipped_steps_count_in_a_row() -> None:
    limit, without = SkipLimit(2), SkipLimit(0)
    reached = []
    for skipped in (True, False, True, True):
        limit.count(skipped=skipped)
        without.count(skipped=skipped)
        reached.append(limit.reached)
    assert reached == [False, False, False, True]
    assert (without.in_a_row, without.reached) == (2, False)
