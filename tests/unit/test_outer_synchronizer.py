"""The synchronizer does what the reference says, for every way of timing and applying."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_muloco.config.outer import CosineRamp, LinearRamp, Steps
from megatron_muloco.errors import CheckpointError, ConfigError
from megatron_muloco.outer.diagnostics import OuterReport, PseudogradientSketch, cosines
from megatron_muloco.outer.fragments import FragmentPlan
from megatron_muloco.outer.guard import Guard, Verdict
from megatron_muloco.outer.optimizer import Mix, OuterNesterov
from megatron_muloco.outer.reducer import Measurement, Reduced
from megatron_muloco.outer.reference import Parameters, Reference, Settings
from megatron_muloco.outer.schedule import SyncSchedule
from megatron_muloco.outer.synchronizer import Synchronizer
from tests.support.replicas import (
    Exchange,
    ExchangeReducer,
    Replica,
    in_lockstep,
    synchronizer_of,
    whole_shard,
)
from tests.support.tensors import assert_equal, integer_tensor

SIZES = {"a": 5, "b": 3, "c": 4}
FRAGMENTS: dict[int, list[list[str]]] = {
    1: [["a", "b", "c"]],
    2: [["a"], ["b", "c"]],
    3: [["a"], ["b"], ["c"]],
}
# Rounds of 3, 5, 3, 3, ... steps, in which eta and mu change as well.
ROUNDS: dict[str, Any] = {
    "sync_interval": Steps(kind="steps", values=((1, 3), (2, 5), (3, 3))),
    "outer_lr": CosineRamp(kind="cosine", start=0.9, end=0.6, rounds=3),
    "outer_momentum": LinearRamp(kind="linear", start=0.5, end=0.9, rounds=4),
}


def start() -> Parameters:
    return {name: integer_tensor(size, seed=size) for name, size in SIZES.items()}


def descend(replica: int) -> Callable[[Parameters, int], None]:
    """A replica's inner step: towards a target of its own, so that nothing cancels by chance."""

    def step(local: Parameters, t: int) -> None:
        for name, tensor in local.items():
            target = integer_tensor(tensor.numel(), seed=1000 * replica + 10 * t + len(name))
            tensor.sub_(0.3 * (tensor - target))

    return step


def settings(**changes: Any) -> Settings:
    base = Settings(
        sync_interval=4,
        train_iters=11,
        fragments=FRAGMENTS[1],
        outer_lr=0.7,
        outer_momentum=0.9,
    )
    return replace(base, **changes)


def train(
    s: Settings,
    num_replicas: int,
    inner: Callable[[int], Callable[[Parameters, int], None]] = descend,
    **options: Any,
) -> list[tuple[Parameters, Parameters, list[OuterReport]]]:
    """Return every replica's final anchor, local parameters and reports."""

    def body(k: int, reducer: ExchangeReducer) -> Any:
        replica = Replica(start())
        synchronizer = synchronizer_of(replica.port(), s, reducer, num_replicas, **options)
        reports = []
        for t in range(1, s.train_iters + 1):
            inner(k)(replica.parameters, t)
            reports.append(synchronizer.after_inner_step(t))
        reports.append(synchronizer.flush())
        return dict(synchronizer.anchors()), replica.parameters, [r for r in reports if r]

    return list(in_lockstep(body, num_replicas))


def assert_same(actual: Parameters, expected: Parameters, message: str) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_equal(actual[name], tensor, f"{message}, {name}")


def compare_with_reference(s: Settings, num_replicas: int, **options: Any) -> Reference:
    reference = Reference(start(), [descend(k) for k in range(num_replicas)], s)
    reference.run()
    for k, (anchor, local, _) in enumerate(train(s, num_replicas, **options)):
        assert_same(anchor, reference.anchor, f"anchor of replica {k}")
        assert_same(local, reference.local[k], f"local parameters of replica {k}")
    return reference


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
@pytest.mark.parametrize(
    ("count", "overlap_steps", "apply"),
    [
        pytest.param(count, tau, apply, id=f"P{count}-tau{tau}-{name}")
        for (count, tau), (name, apply) in product(
            product([1, 2, 3], [0, 1, 3]),
            {
                "take": {},
                "mix": {"mixing_weight": 0.5},
                "mix0.3": {"mixing_weight": 0.3},
                "additive": {"additive": True},
            }.items(),
        )
    ],
)
def test_every_timing_and_apply_rule_is_the_reference_bit_for_bit(
    num_replicas: int, count: int, overlap_steps: int, apply: dict[str, Any]
) -> None:
    s = settings(fragments=FRAGMENTS[count], overlap_steps=overlap_steps, **apply)
    compare_with_reference(s, num_replicas)


@pytest.mark.parametrize("train_iters", [8, 11, 12, 16])
@pytest.mark.parametrize("overlap_steps", [0, 1, 2])
@pytest.mark.parametrize("count", [1, 3])
def test_schedules_over_rounds_are_the_references(
    count: int, overlap_steps: int, train_iters: int
) -> None:
    s = settings(
        fragments=FRAGMENTS[count],
        overlap_steps=overlap_steps,
        mixing_weight=0.5,
        train_iters=train_iters,
        **ROUNDS,
    )
    compare_with_reference(s, 2)


def test_each_fragment_of_a_round_takes_the_rates_of_the_round() -> None:
    """H = 2 and 4: both fragments of round 2 are launched in it, one in its middle."""
    s = settings(
        sync_interval=Steps(kind="steps", values=((1, 2), (2, 4))),
        outer_lr=Steps(kind="steps", values=((1, 1.0), (2, 0.5))),
        outer_momentum=0.0,
        fragments=[["a"], ["b", "c"]],
        train_iters=6,
    )

    def down(_: int) -> Callable[[Parameters, int], None]:
        def step(local: Parameters, t: int) -> None:
            for tensor in local.values():
                tensor.sub_(1.0)

        return step

    ((anchor, _, reports),) = train(s, 1, down)
    # 'a' moves by 1 step in round 1 and by 3 in round 2, 'b' by 2 and 4; the flush by 2 for 'a'.
    assert [(r.step, r.round_index, r.launched) for r in reports] == [
        (1, 1, (0,)),
        (2, 1, (1,)),
        (4, 2, (0,)),
        (6, 2, (1,)),
        (6, 2, ()),
    ]
    moved = {"a": 1.0 + 0.5 * 3.0 + 2.0, "b": 2.0 + 0.5 * 4.0, "c": 2.0 + 0.5 * 4.0}
    assert_same(anchor, {n: tensor - moved[n] for n, tensor in start().items()}, "anchor")


@pytest.mark.parametrize("train_iters", [8, 9, 10, 12])
def test_the_flush_is_the_references(train_iters: int) -> None:
    s = settings(
        fragments=FRAGMENTS[3], overlap_steps=2, mixing_weight=0.5, train_iters=train_iters
    )
    compare_with_reference(s, 2)


def test_state_in_host_memory_changes_nothing() -> None:
    compare_with_reference(settings(overlap_steps=1), 2, state_device=torch.device("cpu"))


@pytest.mark.parametrize("interval", [1, 3, 11])
def test_one_averaging_replica_is_the_inner_optimizer_alone(interval: int) -> None:
    def integers(replica: int) -> Callable[[Parameters, int], None]:
        def step(local: Parameters, t: int) -> None:
            for name, tensor in local.items():
                tensor.sub_(integer_tensor(tensor.numel(), seed=10 * t + len(name)))

        return step

    s = settings(sync_interval=interval, outer_lr=1.0, outer_momentum=0.0)
    alone = start()
    for t in range(1, s.train_iters + 1):
        integers(0)(alone, t)
    ((anchor, local, _),) = train(s, 1, integers)
    assert_same(anchor, alone, "anchor")
    assert_same(local, alone, "local")


@pytest.mark.parametrize("num_replicas", [2, 4])
def test_replicas_on_the_same_data_are_one_replica(num_replicas: int) -> None:
    s = settings(fragments=FRAGMENTS[2], overlap_steps=1, mixing_weight=0.5)
    ((anchor, local, _),) = train(s, 1, lambda _: descend(0))
    for other_anchor, other_local, _ in train(s, num_replicas, lambda _: descend(0)):
        assert_same(other_anchor, anchor, "anchor")
        assert_same(other_local, local, "local")


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
def test_one_round_lowers_a_quadratic(num_replicas: int) -> None:
    """The sign test: uphill outer steps would raise every replica's own loss."""
    target = {name: integer_tensor(size, seed=50 + size) for name, size in SIZES.items()}

    def towards_target(_: int) -> Callable[[Parameters, int], None]:
        def step(local: Parameters, t: int) -> None:
            for name, tensor in local.items():
                tensor.sub_(0.1 * (tensor - target[name]))

        return step

    def loss(parameters: Parameters) -> float:
        return sum(float((parameters[n] - target[n]).square().sum()) for n in target)

    s = settings(train_iters=4)
    for anchor, _, _ in train(s, num_replicas, towards_target):
        assert loss(anchor) < 0.9 * loss(start())


def poisoned(bad_replicas: set[int], at: int) -> Callable[[int], Callable[[Parameters, int], None]]:
    def make(k: int) -> Callable[[Parameters, int], None]:
        def step(local: Parameters, t: int) -> None:
            descend(k)(local, t)
            if k in bad_replicas and t == at:
                local["b"][0] = math.nan

        return step

    return make


@pytest.mark.parametrize(
    "overlap",
    [
        pytest.param({}, id="blocking"),
        pytest.param({"overlap_steps": 2, "mixing_weight": 0.5}, id="mix"),
        # With three fragments, two others are in flight when the NaN is found.
        pytest.param({"overlap_steps": 3, "additive": True}, id="additive"),
    ],
)
@pytest.mark.parametrize("count", [1, 3])
def test_a_non_finite_replica_is_left_out_and_starts_from_the_anchor(
    count: int, overlap: dict[str, Any]
) -> None:
    s = settings(fragments=FRAGMENTS[count], **overlap)
    inner = poisoned({1}, at=4)
    reference = Reference(start(), [inner(k) for k in range(3)], s)
    reference.run()
    assert [k for _, k in reference.restarted_from_anchor] == [1]
    results = train(s, 3, inner)
    for k, (anchor, local, reports) in enumerate(results):
        assert_same(anchor, reference.anchor, f"anchor of replica {k}")
        assert_same(local, reference.local[k], f"local parameters of replica {k}")
        assert any(report.restarted_from_anchor for report in reports) == (k == 1)
        weights = [f.weights.tolist() for report in reports for f in report.applied]
        assert weights.count([1.0, 0.0, 1.0]) == 1
        assert not any(report.alarm for report in reports)


def test_a_restart_publishes_all_parameters_at_once() -> None:
    replica = Replica(start())
    broadcast: list[list[str]] = []
    port = replace(
        replica.port(), broadcast_replicated=lambda names: broadcast.append(sorted(names))
    )
    s = settings(fragments=FRAGMENTS[3], overlap_steps=2)
    synchronizer = synchronizer_of(port, s, lone_reducer(), 1)
    replica.parameters["a"][0] = math.nan
    report = synchronizer.after_inner_step(1)  # fragment 0, which is 'a', is launched
    assert report is not None
    assert (report.restarted_from_anchor, report.launched, report.applied) == (True, (0,), ())
    assert (broadcast, replica.published) == ([["a", "b", "c"]], 1)
    assert_same(replica.parameters, start(), "restarted")


def test_without_a_usable_replica_the_anchor_stays_and_an_alarm_is_raised() -> None:
    s = settings(train_iters=4)
    for anchor, local, reports in train(s, 2, poisoned({0, 1}, at=4)):
        assert_same(anchor, start(), "anchor")
        assert_same(local, start(), "local")
        assert reports[0].alarm
        assert reports[0].restarted_from_anchor
        metrics = reports[0].metrics()
        assert metrics["muloco/weight_sum"] == metrics["muloco/update_norm"] == 0.0


def test_an_outlier_among_four_is_left_out_of_one_mean() -> None:
    def inner(k: int) -> Callable[[Parameters, int], None]:
        def step(local: Parameters, t: int) -> None:
            stride = 1000.0 if (k, t) == (2, 8) else 1.0
            for tensor in local.values():
                tensor.sub_(stride)

        return step

    s = settings(train_iters=8, outer_lr=1.0, outer_momentum=0.0)
    for k, (anchor, local, reports) in enumerate(train(s, 4, inner)):
        assert [f.weights.tolist() for r in reports for f in r.applied] == [
            [1.0, 1.0, 1.0, 1.0],
            [1.0, 1.0, 0.0, 1.0],
        ]
        verdict = reports[1].applied[0].verdict
        assert verdict is (Verdict.OUTLIER if k == 2 else Verdict.GOOD)
        assert not reports[1].restarted_from_anchor
        assert_same(anchor, {name: tensor - 8.0 for name, tensor in start().items()}, "anchor")
        assert_same(local, anchor, "local")


def weights_seen(
    s: Settings,
    strides: Callable[[int], float],
    factors: Callable[[int, int], float] = lambda k, t: 1.0,
    **options: Any,
) -> set[tuple[float, ...]]:
    """Return the weights of all applies when replica k moves ``factors(k, t) * strides(t)``."""

    def inner(k: int) -> Callable[[Parameters, int], None]:
        def step(local: Parameters, t: int) -> None:
            for tensor in local.values():
                tensor.sub_(factors(k, t) * strides(t))

        return step

    return {
        tuple(fragment.weights.tolist())
        for _, _, reports in train(s, 4, inner, **options)
        for report in reports
        for fragment in report.applied
    }


def test_a_short_first_interval_sets_no_band() -> None:
    # Fragment 0 is first launched after half an interval of warm-up, then moves 20 times as far.
    s = settings(fragments=FRAGMENTS[2], train_iters=8)
    assert weights_seen(s, lambda t: 1.0 if t <= 2 else 10.0) == {(1.0,) * 4}


def test_an_interval_of_another_length_is_not_held_against_the_band() -> None:
    # Two steps, then 40: 20 times as far, where the band is 10. As long again, it holds.
    s = settings(sync_interval=Steps(kind="steps", values=((1, 2), (2, 40))), train_iters=82)
    assert weights_seen(s, lambda t: 1.0) == {(1.0,) * 4}
    assert weights_seen(s, lambda t: 1.0 if t <= 42 else 20.0) == {(1.0,) * 4, (0.0,) * 4}


@pytest.mark.parametrize("fragments", [1, 2])
@pytest.mark.parametrize(
    "overlap",
    [
        {},
        {"overlap_steps": 3},
        {"overlap_steps": 3, "additive": True},
        {"overlap_steps": 1, "mixing_weight": 0.5},
    ],
    ids=["at once", "overlap", "additive", "mix"],
)
def test_a_falling_learning_rate_excludes_nobody(fragments: int, overlap: dict[str, Any]) -> None:
    # The sums of the last two rounds have the ratio 10 to 26, and the replicas differ a little.
    s = settings(
        fragments=FRAGMENTS[fragments],
        train_iters=24,
        outer_lr=1.0,
        outer_momentum=0.0,
        **overlap,
    )

    def lr(t: int) -> float:
        return 0.01 * (25 - t)

    def guard() -> Guard:
        return Guard(4, max_norm_ratio=2.5)

    def unlike(k: int, t: int) -> float:
        return (0.96, 1.0, 1.0, 1.04)[k]

    def ten_times(k: int, t: int) -> float:
        return 10.0 if k == 2 and t > 18 else 1.0

    constant = weights_seen(s, lr, unlike, guard=guard())
    assert constant != {(1.0,) * 4}, "the case does not show what the learning rate is for"
    assert weights_seen(s, lr, unlike, guard=guard(), learning_rate=lr) == {(1.0,) * 4}
    leapt = weights_seen(s, lr, ten_times, guard=guard(), learning_rate=lr)
    assert leapt == {(1.0,) * 4, (1.0, 1.0, 0.0, 1.0)}


def test_the_flush_knows_no_band() -> None:
    # The one step that is left moves a fortieth of a round.
    assert weights_seen(settings(train_iters=9), lambda t: 0.1 if t == 9 else 1.0) == {(1.0,) * 4}


def test_the_report_measures_the_round() -> None:
    def inner(k: int) -> Callable[[Parameters, int], None]:
        def step(local: Parameters, t: int) -> None:
            local["a"][k] -= 3.0

        return step

    s = settings(sync_interval=1, train_iters=1, outer_lr=0.5, outer_momentum=0.0)
    for _, _, (report, _) in train(s, 2, inner):
        (fragment,) = report.applied
        assert (report.step, report.round_index, report.launched) == (1, 1, (0,))
        metrics = fragment.metrics()
        assert metrics["muloco/pseudogradient_norm"] == 3.0
        # Delta_0 = (3, 0), Delta_1 = (0, 3), mean = (1.5, 1.5): half the step, 45 degrees apart.
        assert metrics["muloco/update_norm"] == pytest.approx(0.75 * math.sqrt(2))
        assert metrics["muloco/cosine_to_mean"] == pytest.approx(math.sqrt(0.5))


def test_line_values_reach_every_replica() -> None:
    def body(k: int, reducer: ExchangeReducer) -> Tensor:
        replica = Replica(start())
        s = settings(sync_interval=1, train_iters=1)
        synchronizer = synchronizer_of(replica.port(), s, reducer, 2)
        report = synchronizer.after_inner_step(1, torch.tensor([float(k), 10.0]))
        assert report is not None
        return report.applied[0].line_values

    for metadata in in_lockstep(body, 2):
        assert metadata.tolist() == [[0.0, 10.0], [1.0, 10.0]]


@pytest.mark.parametrize("stop_at", range(1, 12))
@pytest.mark.parametrize("rounds", [{}, ROUNDS], ids=["constant", "changing"])
def test_stopped_anywhere_and_resumed_is_never_stopped(
    rounds: dict[str, Any], stop_at: int
) -> None:
    s = settings(fragments=FRAGMENTS[3], overlap_steps=2, mixing_weight=0.5, **rounds)

    def body(k: int, reducer: ExchangeReducer) -> Any:
        replica = Replica(start())
        synchronizer = synchronizer_of(replica.port(), s, reducer, 2)
        for t in range(1, s.train_iters + 1):
            descend(k)(replica.parameters, t)
            synchronizer.after_inner_step(t)
            if t == stop_at:
                saved = synchronizer.state_dict()
                # As from disk: other memory, and a model that was initialised anew.
                tensors = {
                    kind: {name: tensor.clone() for name, tensor in group.items()}
                    for kind, group in saved["tensors"].items()
                }
                replica = Replica({n: x.clone() for n, x in replica.parameters.items()})
                synchronizer = synchronizer_of(replica.port(), s, reducer, 2)
                synchronizer.load_state_dict({"tensors": tensors, "scalars": saved["scalars"]})
        synchronizer.flush()
        return dict(synchronizer.anchors()), replica.parameters

    stopped = in_lockstep(body, 2)
    for (anchor, local), (whole_anchor, whole_local, _) in zip(stopped, train(s, 2), strict=True):
        assert_same(anchor, whole_anchor, "anchor")
        assert_same(local, whole_local, "local")


def test_saving_does_not_disturb_the_run() -> None:
    s = settings(fragments=FRAGMENTS[3], overlap_steps=2)

    def body(k: int, reducer: ExchangeReducer) -> Parameters:
        replica = Replica(start())
        synchronizer = synchronizer_of(replica.port(), s, reducer, 2)
        for t in range(1, s.train_iters + 1):
            descend(k)(replica.parameters, t)
            synchronizer.after_inner_step(t)
            synchronizer.state_dict()
        synchronizer.flush()
        return dict(synchronizer.anchors())

    for anchor, (expected, _, _) in zip(in_lockstep(body, 2), train(s, 2), strict=True):
        assert_same(anchor, expected, "anchor")


def test_sketches_compare_replicas_and_are_no_part_of_the_state() -> None:
    s = settings(fragments=FRAGMENTS[2], overlap_steps=1)

    def body(k: int, reducer: ExchangeReducer) -> Any:
        replica = Replica(start())
        sketch = PseudogradientSketch(width=8, interval=2)
        synchronizer = synchronizer_of(replica.port(), s, reducer, 2, sketch=sketch)
        compared = []
        for t in range(1, s.train_iters + 1):
            descend(k)(replica.parameters, t)
            report = synchronizer.after_inner_step(t, torch.tensor([float(k)]))
            for part in report.applied if report else ():
                assert part.line_values.tolist() == [[0.0], [1.0]]
                if "muloco/cosine_pairwise_min" in part.measurements:
                    compared.append((t, part.fragment))
                    products = part.measurements["muloco/cosine_pairwise_min"].numbers
                    own = cosines(products.view(2, 2)).diagonal()
                    assert own.tolist() == pytest.approx([1.0, 1.0])
            for entry in synchronizer.state_dict()["scalars"]["in_flight"]:
                assert len(entry["norms"]) == 2  # of each replica; metadata belong to this start
                assert "metadata" not in entry
        synchronizer.flush()
        return compared, dict(synchronizer.anchors())

    # Rounds of four steps; in the second, launches after steps 6 and 8 are applied one step later.
    for (compared, anchor), (expected, _, _) in zip(in_lockstep(body, 2), train(s, 2), strict=True):
        assert compared == [(7, 0), (9, 1)]
        assert_same(anchor, expected, "anchor")


class CountingReducer(ExchangeReducer):
    """Measures a metric that the package does not know."""

    def wait(self, handle: Any) -> Reduced:
        reduced = super().wait(handle)
        count = sum(tensor.numel() for tensor in reduced.mean.values())
        measured = {"lab/elements": Measurement.of(count)}
        return Reduced(reduced.mean, replace(reduced.stats, measurements=measured))


def test_a_reducer_has_metrics_of_its_own() -> None:
    s = settings(fragments=FRAGMENTS[2], sync_interval=1, train_iters=1)
    synchronizer = synchronizer_of(Replica(start()).port(), s, CountingReducer(Exchange(1), 0), 1)
    report = synchronizer.after_inner_step(1)
    assert report is not None
    assert [part.metrics()["lab/elements"] for part in report.applied] == [5.0, 7.0]
    assert report.metrics()["lab/elements"] == 12.0


def lone_reducer() -> ExchangeReducer:
    return ExchangeReducer(Exchange(1), 0)


def alone(s: Settings, replica: Replica) -> Synchronizer:
    return synchronizer_of(replica.port(), s, lone_reducer(), 1)


def test_a_state_of_another_schedule_is_refused() -> None:
    replica = Replica(start())
    synchronizer = alone(settings(overlap_steps=2), replica)
    for t in range(1, 6):
        synchronizer.after_inner_step(t)
    saved = synchronizer.state_dict()
    with pytest.raises(CheckpointError, match="fragments in flight"):
        alone(settings(overlap_steps=1), replica).load_state_dict(saved)


def test_a_state_of_another_layout_is_refused() -> None:
    saved = alone(settings(), Replica(start())).state_dict()
    del saved["tensors"]["momentum"]["b"]
    with pytest.raises(CheckpointError, match="'momentum': missing b"):
        alone(settings(), Replica(start())).load_state_dict(saved)


def test_evaluation_sees_the_anchor_and_leaves_no_trace() -> None:
    replica = Replica(start())
    synchronizer = alone(settings(), replica)
    for t in range(1, 7):
        descend(0)(replica.parameters, t)
        synchronizer.after_inner_step(t)
    before = {name: tensor.clone() for name, tensor in replica.parameters.items()}
    published = replica.published
    with synchronizer.anchor_loaded():
        assert_same(replica.parameters, dict(synchronizer.anchors()), "inside")
        assert replica.published == published + 1
    assert_same(replica.parameters, before, "after")
    assert replica.published == published + 2


def test_a_failed_evaluation_restores_without_a_collective() -> None:
    replica = Replica(start())
    synchronizer = alone(settings(), replica)
    descend(0)(replica.parameters, 1)
    before = {name: tensor.clone() for name, tensor in replica.parameters.items()}
    with pytest.raises(ZeroDivisionError), synchronizer.anchor_loaded():
        raise ZeroDivisionError
    assert_same(replica.parameters, before, "after")
    assert replica.published == 1


def test_replicated_parameters_follow_their_primary_rank_before_parameters_are_published() -> None:
    calls: list[str] = []
    owner, replicated = start(), start()["a"]
    masters = {**owner, "norm": replicated}
    port = replace(
        Replica(owner).port(),
        shards=[
            *(whole_shard(name, tensor) for name, tensor in owner.items()),
            whole_shard("norm", replicated, is_primary=False),
        ],
        masters=masters,
        broadcast_replicated=lambda names: calls.append(f"replicated: {len(names)}"),
        publish=lambda: calls.append("publish"),
    )
    s = settings(sync_interval=1, fragments=[["a", "b", "c", "norm"]])
    synchronizer = synchronizer_of(port, s, lone_reducer(), 1)
    synchronizer.after_inner_step(1)
    assert calls == ["replicated: 4", "publish"]
    assert "norm" not in synchronizer.anchors()


def test_masters_that_are_views_of_parameters_are_not_kept_as_the_anchor() -> None:
    parameter = torch.nn.Parameter(integer_tensor(12, seed=1))
    replica = Replica({"a": parameter.view(-1), "b": start()["b"], "c": start()["c"]})
    synchronizer = alone(settings(sync_interval=1), replica)
    anchor = synchronizer.anchors()["a"]
    assert not anchor.requires_grad
    with torch.no_grad():
        parameter.add_(1.0)
    assert_equal(anchor, integer_tensor(12, seed=1))
    synchronizer.after_inner_step(1)
    assert_equal(parameter.detach(), synchronizer.anchors()["a"])


def test_a_parameter_without_a_fragment_is_refused() -> None:
    with pytest.raises(ConfigError, match="no fragment for c"):
        Synchronizer(
            Replica(start()).port(),
            FragmentPlan((("a", "b"),)),
            SyncSchedule(sync_interval=1, train_iters=1),
            OuterNesterov(lr=1.0, momentum=0.0),
            Mix(),
            lone_reducer(),
            lone_reducer(),
            Guard(1),
        )
