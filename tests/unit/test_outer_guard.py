"""The weight of a replica: two numbers in, one verdict out."""

import json
import math

import torch

from megatron_muloco.outer.guard import Guard, Verdict, local_statistics


def test_statistics_count_non_finite_tensors_and_square_the_others() -> None:
    tensors = [torch.tensor([3.0, 4.0]), torch.tensor([1.0, math.inf]), torch.tensor([math.nan])]
    assert local_statistics(tensors, torch.device("cpu")).tolist() == [2.0, 25.0]
    assert local_statistics([], torch.device("cpu")).tolist() == [0.0, 0.0]


def test_a_non_finite_replica_has_no_weight_at_any_k() -> None:
    for lr_sum in (1.0, 0.0, None):
        verdict = Guard(num_replicas=1).judge(0, non_finite=True, norm=math.nan, lr_sum=lr_sum)
        assert (verdict, verdict.weight) == (Verdict.NON_FINITE, 0.0)


def verdict_of(guard: Guard, norm: float, *, fragment: int = 0, lr_sum: float = 1.0) -> Verdict:
    return guard.judge(fragment, non_finite=False, norm=norm, lr_sum=lr_sum)


def test_the_band_needs_a_previous_round_and_four_replicas() -> None:
    for num_replicas, expected in ((3, Verdict.GOOD), (4, Verdict.OUTLIER)):
        guard = Guard(num_replicas)
        assert verdict_of(guard, 1e6) is Verdict.GOOD
        guard.observe(0, [1.0, 2.0, 3.0, math.nan], lr_sum=1.0)
        assert verdict_of(guard, 20.0) is Verdict.GOOD
        assert verdict_of(guard, 20.5) is expected
        assert verdict_of(guard, 0.1) is expected
        assert verdict_of(guard, 20.5, fragment=1) is Verdict.GOOD


def test_the_band_follows_when_all_norms_move() -> None:
    guard = Guard(4)
    guard.observe(0, [1.0] * 4, lr_sum=1.0)
    assert verdict_of(guard, 100.0) is Verdict.OUTLIER
    guard.observe(0, [100.0] * 4, lr_sum=1.0)
    assert verdict_of(guard, 100.0) is Verdict.GOOD


def test_half_of_the_replicas_cannot_exclude_the_other_half() -> None:
    guard = Guard(4)
    guard.observe(0, [1.0] * 4, lr_sum=1.0)
    guard.observe(0, [1.0, 1.2, 1e6, 1e6], lr_sum=1.0, weights=[1.0, 1.0, 0.0, 0.0])
    assert verdict_of(guard, 1.1) is Verdict.GOOD
    assert verdict_of(guard, 1e6) is Verdict.OUTLIER
    # More than half: the band follows them, and comes back when they do.
    guard.observe(0, [1.0, 1e6, 1e6, 1e6], lr_sum=1.0, weights=[1.0, 0.0, 0.0, 0.0])
    assert verdict_of(guard, 1.1) is Verdict.OUTLIER
    guard.observe(0, [1.0] * 4, lr_sum=1.0, weights=[0.0] * 4)
    assert verdict_of(guard, 1.1) is Verdict.GOOD


def test_norms_that_fall_with_the_learning_rate_stay_inside() -> None:
    # The last two rounds of a linear decay to zero; 0.332 is further than 3 from the median.
    guard = Guard(4, max_norm_ratio=3.0)
    guard.observe(0, [1.0, 1.0, 0.99, 1.01], lr_sum=0.3)
    for norm in (0.332, 0.337, 0.345, 0.353):
        assert verdict_of(guard, norm, lr_sum=0.1) is Verdict.GOOD
    for norm in (10 * 0.345, 0.345 / 10):
        assert verdict_of(guard, norm, lr_sum=0.1) is Verdict.OUTLIER


def test_an_interval_without_a_learning_rate_is_not_compared() -> None:
    guard = Guard(4)
    guard.observe(0, [1.0] * 4, lr_sum=1.0)
    assert verdict_of(guard, 0.0, lr_sum=0.0) is Verdict.GOOD
    assert guard.judge(0, non_finite=False, norm=100.0, lr_sum=None) is Verdict.GOOD
    guard.observe(0, [1e-30] * 4, lr_sum=0.0)
    assert verdict_of(guard, 1.0) is Verdict.GOOD


def test_a_round_without_progress_does_not_close_the_band() -> None:
    guard = Guard(4)
    guard.observe(0, [0.0] * 4, lr_sum=1.0)
    guard.observe(0, [math.nan] * 4, lr_sum=1.0)
    assert verdict_of(guard, 1.0) is Verdict.GOOD


def test_the_state_survives() -> None:
    guard, restored = Guard(4), Guard(4)
    guard.observe(2, [1.0, 2.0, 3.0], lr_sum=0.5)
    restored.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert restored.state_dict() == guard.state_dict()
    assert verdict_of(restored, 21.0, fragment=2, lr_sum=0.5) is Verdict.OUTLIER
    assert verdict_of(restored, 21.0, fragment=2, lr_sum=1.0) is Verdict.GOOD


def test_medians_of_undivided_norms_are_not_used() -> None:
    restored = Guard(4)
    restored.load_state_dict({"0": 0.3})
    assert verdict_of(restored, 0.3, lr_sum=0.01) is Verdict.GOOD
    assert restored.state_dict() == Guard(4).state_dict()


def test_empty_rounds_count_until_a_round_has_enough_replicas() -> None:
    guard = Guard(3, min_usable=2, max_empty_rounds=2)
    for usable, rounds, exhausted in ((1, 1, False), (2, 0, False), (0, 1, False), (1, 2, True)):
        guard.count_usable(0, usable)
        assert (guard.empty_rounds, guard.exhausted([0])) == (rounds, exhausted)
    restored = Guard(3, min_usable=2, max_empty_rounds=2)
    restored.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert restored.empty(0) == 2
    restored.load_state_dict({"medians_per_lr": {}})  # a checkpoint from before they were counted
    assert restored.empty_rounds == 0


def test_one_fragment_may_be_empty_while_another_is_not() -> None:
    guard = Guard(2, max_empty_rounds=2)
    for fragment, usable in ((0, 0), (1, 2), (0, 0), (1, 2)):
        guard.count_usable(fragment, usable)
    assert (guard.empty(0), guard.empty(1), guard.empty_rounds) == (2, 0, 2)
    assert guard.exhausted([0])
    # After a stop and a resume, fragment 1 is applied first.
    assert not guard.exhausted([1])


def test_without_a_limit_nothing_stops() -> None:
    guard = Guard(1)
    for _ in range(100):
        guard.count_usable(0, 0)
    assert (guard.empty_rounds, guard.exhausted([0])) == (100, False)
