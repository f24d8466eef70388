"""The weight of a replica: two numbers in, one verdict out."""

import math

import torch

from megatron_muloco.outer.guard import Guard, Verdict, local_statistics


def test_statistics_count_non_finite_tensors_and_square_the_others() -> None:
    tensors = [torch.tensor([3.0, 4.0]), torch.tensor([1.0, math.inf]), torch.tensor([math.nan])]
    assert local_statistics(tensors, torch.device("cpu")).tolist() == [2.0, 25.0]
    assert local_statistics([], torch.device("cpu")).tolist() == [0.0, 0.0]


def test_a_non_finite_replica_has_no_weight_at_any_k() -> None:
    verdict = Guard(num_replicas=1).judge(0, non_finite=True, norm=math.nan)
    assert (verdict, verdict.weight) == (Verdict.NON_FINITE, 0.0)


def test_the_band_needs_a_previous_round_and_four_replicas() -> None:
    for num_replicas, expected in ((3, Verdict.GOOD), (4, Verdict.OUTLIER)):
        guard = Guard(num_replicas)
        assert guard.judge(0, non_finite=False, norm=1e6) is Verdict.GOOD
        guard.observe(0, [1.0, 2.0, 3.0, math.nan])
        assert guard.judge(0, non_finite=False, norm=20.0) is Verdict.GOOD
        assert guard.judge(0, non_finite=False, norm=20.5) is expected
        assert guard.judge(0, non_finite=False, norm=0.1) is expected
        assert guard.judge(1, non_finite=False, norm=20.5) is Verdict.GOOD


def test_the_band_follows_when_all_norms_move() -> None:
    guard = Guard(4)
    guard.observe(0, [1.0] * 4)
    assert guard.judge(0, non_finite=False, norm=100.0) is Verdict.OUTLIER
    guard.observe(0, [100.0] * 4)
    assert guard.judge(0, non_finite=False, norm=100.0) is Verdict.GOOD


def test_a_round_without_progress_does_not_close_the_band() -> None:
    guard = Guard(4)
    guard.observe(0, [0.0] * 4)
    guard.observe(0, [math.nan] * 4)
    assert guard.judge(0, non_finite=False, norm=1.0) is Verdict.GOOD


def test_the_state_survives() -> None:
    guard, restored = Guard(4), Guard(4)
    guard.observe(2, [1.0, 2.0, 3.0])
    restored.load_state_dict(guard.state_dict())
    assert restored.judge(2, non_finite=False, norm=21.0) is Verdict.OUTLIER
