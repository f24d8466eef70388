"""The reference itself: numbers that a person can check, and the relations it must keep."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_muloco.outer.reference import Parameters, Reference, Settings
from tests.support.tensors import assert_close, assert_equal


def down(*strides: float) -> list[Callable[[Parameters, int], None]]:
    """Inner steps that subtract a constant, one replica a stride."""

    def inner(stride: float) -> Callable[[Parameters, int], None]:
        def step(local: Parameters, t: int) -> None:
            for tensor in local.values():
                tensor.sub_(stride)

        return step

    return [inner(stride) for stride in strides]


def at_zero(*names: str) -> Parameters:
    return {name: torch.zeros(1) for name in names}


def settings(**changes: Any) -> Settings:
    base: dict[str, Any] = {"sync_interval": 2, "train_iters": 4, "fragments": [["x"]]}
    return Settings(**{**base, **changes})


def test_two_rounds_of_nesterov_by_hand() -> None:
    s = settings(outer_lr=0.5, outer_momentum=0.5)
    reference = Reference(at_zero("x"), down(1.0, 3.0), s)
    reference.step(1)
    reference.step(2)
    # Deltas 2 and 6, mean 4. u = 4, theta = 0 - 0.5 (4 + 0.5 * 4) = -3.
    assert (reference.u["x"].item(), reference.anchor["x"].item()) == (4.0, -3.0)
    assert [local["x"].item() for local in reference.local] == [-3.0, -3.0]
    reference.step(3)
    reference.step(4)
    # Same deltas. u = 0.5 * 4 + 4 = 6, theta = -3 - 0.5 (4 + 0.5 * 6) = -6.5.
    assert (reference.u["x"].item(), reference.anchor["x"].item()) == (6.0, -6.5)


def test_overlap_and_mixing_by_hand() -> None:
    s = settings(sync_interval=2, overlap_steps=1, mixing_weight=0.25, train_iters=3)
    reference = Reference(at_zero("x"), down(1.0, 3.0), s)
    for t in (1, 2, 3):
        reference.step(t)
    # Launched after 2 with locals -2 and -6: mean delta 4, theta = -4. Locals after 3: -3 and -9.
    assert reference.anchor["x"].item() == -4.0
    assert [local["x"].item() for local in reference.local] == [
        0.75 * -4 + 0.25 * -3,
        0.75 * -4 + 0.25 * -9,
    ]


def test_additive_keeps_each_replicas_own_progress() -> None:
    s = settings(overlap_steps=1, additive=True, train_iters=3)
    reference = Reference(at_zero("x"), down(1.0, 3.0), s)
    for t in (1, 2, 3):
        reference.step(t)
    assert [local["x"].item() for local in reference.local] == [-4.0 - 1.0, -4.0 - 3.0]


def test_fragments_close_the_round_one_after_the_other() -> None:
    # H = 4, P = 2: offsets 2 and 0, so x is synchronised after 2, 6 and y after 4, 8.
    s = settings(sync_interval=4, train_iters=7, fragments=[["x"], ["y"]])
    reference = Reference(at_zero("x", "y"), down(1.0, 3.0), s)
    history = []
    for t in range(1, 8):
        reference.step(t)
        history.append((reference.anchor["x"].item(), reference.anchor["y"].item()))
    assert history == [(0, 0), (-4, 0), (-4, 0), (-4, -8), (-4, -8), (-12, -8), (-12, -8)]
    reference.flush()
    assert (reference.anchor["x"].item(), reference.anchor["y"].item()) == (-14.0, -14.0)
    assert reference.local[0] == reference.local[1]


def test_the_flush_applies_what_is_in_flight_and_averages_the_rest() -> None:
    # Launched after 4 and applied by the flush with lr 0.5; nothing has happened since: no average.
    in_flight = Reference(at_zero("x"), down(1.0, 3.0), settings(overlap_steps=1, outer_lr=0.5))
    in_flight.run()
    # After 2: delta 4, theta -2 at step 3, where locals (-3, -9) take it; after 4: (-3, -5), so the
    # mean delta is 2 and theta = -2 - 0.5 * 2.
    assert in_flight.anchor["x"].item() == -3.0
    # One step more than two rounds: the plain mean, without lr and momentum.
    averaged = Reference(at_zero("x"), down(1.0, 3.0), settings(train_iters=5, outer_momentum=0.5))
    averaged.run()
    momentum_before = 0.5 * 4 + 4
    assert averaged.u["x"].item() == momentum_before
    assert averaged.anchor["x"].item() == averaged.local[0]["x"].item()


def keep_largest(name: str, start: int, values: Tensor) -> Tensor:
    """Top-k with k = 1: the codec that loses most."""
    kept = torch.zeros_like(values)
    if values.numel():
        index = values.abs().argmax()
        kept[index] = values[index]
    return kept


def test_the_second_encoding_sees_the_mean_and_units_are_encoded_one_by_one() -> None:
    def step(local: Parameters, t: int) -> None:
        local["x"].sub_(torch.tensor([1.0, 2.0, 3.0, 4.0]))

    for units, kept in (({}, [0, 0, 0, -4]), ({"x": [(0, 2), (2, 4)]}, [0, -2, 0, -4])):
        s = settings(sync_interval=1, train_iters=1, codec=keep_largest, coding_units=units)
        reference = Reference({"x": torch.zeros(4)}, [step, step], s)
        reference.run()
        assert reference.anchor["x"].tolist() == kept


def test_undecayed_error_feedback_loses_nothing() -> None:
    """What reached the anchor plus what both encodings still hold is what the replicas gave."""
    generator = torch.Generator().manual_seed(0)
    given: list[Tensor] = []

    def noise(local: Parameters, t: int) -> None:
        given.append(torch.randint(-8, 9, (6,), generator=generator).float())
        local["x"].sub_(given[-1])

    s = settings(
        sync_interval=1, train_iters=5, codec=keep_largest, error_feedback=True, error_decay=1.0
    )
    reference = Reference({"x": torch.zeros(6)}, [noise, noise], s)
    reference.run()
    held = (reference.residual[0]["x"] + reference.residual[1]["x"]) / 2 + reference.f["x"]
    assert held.count_nonzero() > 0
    assert (held - reference.anchor["x"]).tolist() == (sum(given) / 2).tolist()


def test_residuals_decay() -> None:
    def first_step_only(local: Parameters, t: int) -> None:
        if t == 1:
            local["x"].sub_(torch.tensor([4.0, 3.0]))

    s = settings(
        sync_interval=1, train_iters=2, codec=keep_largest, error_feedback=True, error_decay=0.5
    )
    reference = Reference({"x": torch.zeros(2)}, [first_step_only], s)
    reference.step(1)
    assert reference.anchor["x"].tolist() == [-4.0, 0.0]
    assert reference.residual[0]["x"].tolist() == [0.0, 3.0]
    reference.step(2)
    assert reference.anchor["x"].tolist() == [-4.0, -1.5]
    assert reference.residual[0]["x"].tolist() == [0.0, 0.0]


def test_error_feedback_without_loss_is_no_error_feedback() -> None:
    def final(**changes: Any) -> Tensor:
        s = settings(outer_lr=0.7, outer_momentum=0.9, **changes)
        reference = Reference(at_zero("x"), down(1.0, 3.0), s)
        reference.run()
        return reference.anchor["x"]

    assert_equal(final(error_feedback=True), final())


def test_the_outer_lr_enters_once_under_error_feedback() -> None:
    s = settings(sync_interval=1, train_iters=1, outer_lr=0.5, error_feedback=True)
    reference = Reference(at_zero("x"), down(2.0), s)
    reference.run()
    assert reference.anchor["x"].item() == -1.0


def test_weights_leave_replicas_out() -> None:
    s = settings(sync_interval=1, train_iters=1)
    reference = Reference(
        at_zero("x"), down(1.0, 3.0, 100.0), s, weigh=lambda k, i, t, delta: float(k != 2)
    )
    reference.run()
    assert reference.anchor["x"].item() == -2.0
    assert reference.restarted_from_anchor == []


def test_a_non_finite_replica_restarts_from_the_anchor_with_no_residual() -> None:
    def broken(local: Parameters, t: int) -> None:
        local["x"].fill_(math.nan)

    s = settings(sync_interval=1, train_iters=1, error_feedback=True, mixing_weight=0.5)
    reference = Reference(at_zero("x"), [*down(4.0), broken], s)
    reference.run()
    assert reference.restarted_from_anchor == [(1, 1)]
    assert reference.anchor["x"].item() == -4.0
    assert reference.local[1]["x"].item() == -2.0  # half anchor, half the anchor it restarted from
    assert reference.residual[1]["x"].item() == 0.0


@pytest.mark.parametrize("interval", [1, 3])
def test_one_averaging_replica_is_the_inner_optimizer_alone(interval: int) -> None:
    generator = torch.Generator().manual_seed(1)
    strides = [torch.randn(20, generator=generator) for _ in range(6)]

    def step(local: Parameters, t: int) -> None:
        local["x"].sub_(strides[t - 1])

    alone = {"x": torch.ones(20)}
    for t in range(1, 7):
        step(alone, t)
    reference = Reference(
        {"x": torch.ones(20)}, [step], settings(sync_interval=interval, train_iters=6)
    )
    reference.run()
    # theta - (theta - theta_k) rounds twice a sync, each time by at most half an ulp (6e-8) of
    # numbers below 16, at most six times.
    assert_close(reference.anchor["x"], alone["x"], rtol=0.0, atol=6 * 2 * 16 * 6e-8)
