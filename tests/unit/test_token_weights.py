"""Replicas weighed by the tokens that they trained on."""

from typing import Any

import pytest

from megatron_muloco.outer.guard import Progress
from megatron_muloco.outer.reference import Parameters, Reference, Settings
from tests.support.replicas import ExchangeReducer, Replica, in_lockstep, synchronizer_of
from tests.support.tensors import assert_equal, integer_tensor

NAMES = {"a": 5, "b": 3}
INTERVAL = 4
# Fragment a is launched after steps 2, 6, 10; b after 4, 8: a sees skips in other intervals than b.
SETTINGS = Settings(
    sync_interval=INTERVAL,
    train_iters=10,
    fragments=[["a"], ["b"]],
    outer_lr=0.7,
    outer_momentum=0.9,
)
SKIPPED = {0: {3, 4}, 1: {5, 6, 7, 8}, 2: set()}


def start() -> Parameters:
    return {name: integer_tensor(size, seed=size) for name, size in NAMES.items()}


def descend(replica: int) -> Any:
    def step(local: Parameters, t: int) -> None:
        if t in SKIPPED[replica]:
            return
        for name, tensor in local.items():
            target = integer_tensor(tensor.numel(), seed=1000 * replica + 10 * t + len(name))
            tensor.sub_(0.3 * (tensor - target))

    return step


def share(replica: int, fragment: int, t: int) -> float:
    """Steps trained since the fragment's previous launch; the first of `a` covers two steps."""
    first = max(0, t - INTERVAL)
    steps = range(first + 1, t + 1)
    return sum(step not in SKIPPED[replica] for step in steps) / len(steps)


def train(by_tokens: bool, stop_after: int | None = None) -> list[Any]:
    """Return every replica's anchor and the weights of its outer steps; perhaps stop and resume."""

    def body(k: int, reducer: ExchangeReducer) -> Any:
        replica = Replica(start())
        options = {"weigh_by_tokens": by_tokens}
        synchronizer = synchronizer_of(replica.port(), SETTINGS, reducer, 3, **options)
        weights = []
        for t in range(1, SETTINGS.train_iters + 1):
            descend(k)(replica.parameters, t)
            report = synchronizer.after_inner_step(t, trained=float(t not in SKIPPED[k]))
            weights += [part.weights.tolist() for part in report.applied] if report else []
            if t == stop_after:
                state = synchronizer.state_dict()
                synchronizer = synchronizer_of(replica.port(), SETTINGS, reducer, 3, **options)
                synchronizer.load_state_dict(state)
        return dict(synchronizer.anchors()), weights

    return list(in_lockstep(body, 3))


@pytest.mark.parametrize("stop_after", [None, 3, 7])
def test_weights_are_shares_of_the_interval(stop_after: int | None) -> None:
    """All of it fp32-exact: shares are multiples of a quarter."""
    reference = Reference(
        start(),
        [descend(k) for k in range(3)],
        SETTINGS,
        weigh=lambda k, fragment, t, delta: share(k, fragment, t),
    )
    for t in range(1, SETTINGS.train_iters + 1):
        reference.step(t)
    for anchor, weights in train(by_tokens=True, stop_after=stop_after):
        for name, tensor in reference.anchor.items():
            assert_equal(anchor[name], tensor, name)
        launches = [(0, 2), (1, 4), (0, 6), (1, 8), (0, 10)]
        assert weights == [[share(k, i, t) for k in range(3)] for i, t in launches]
        assert weights[3] == [1.0, 0.0, 1.0]  # a replica that trained on nothing has no say


def test_by_replica_all_that_trained_weigh_the_same() -> None:
    for _, weights in train(by_tokens=False):
        launches = [(0, 2), (1, 4), (0, 6), (1, 8), (0, 10)]
        assert weights == [[float(share(k, i, t) > 0) for k in range(3)] for i, t in launches]
        assert weights[3] == [1.0, 0.0, 1.0]  # its zeros would make the mean of the others smaller


def test_what_a_restarted_replica_trained_before_does_not_count() -> None:
    def body(k: int, reducer: ExchangeReducer) -> Any:
        replica = Replica(start())
        synchronizer = synchronizer_of(replica.port(), SETTINGS, reducer, 3, weigh_by_tokens=True)
        weights = []
        for t in range(1, 5):
            if (k, t) == (1, 2):
                replica.parameters["a"].fill_(float("nan"))
            report = synchronizer.after_inner_step(t, trained=1.0)
            weights += [part.weights.tolist() for part in report.applied] if report else []
        return weights

    for weights in in_lockstep(body, 3):
        # b is launched after step 4; replica 1 took the anchor of b, too, after step 2.
        assert weights == [[1.0, 0.0, 1.0], [1.0, 0.5, 1.0]]


def test_progress_begins_again_with_every_launch() -> None:
    progress = Progress()
    for trained in (1.0, 0.0, 1.0, 1.0):
        progress.add(trained)
    assert Progress(**progress.state_dict()) == progress  # type: ignore[arg-type]
    assert progress.take() == 0.75
    progress.add(0.0)
    assert progress.take() == 0.0
