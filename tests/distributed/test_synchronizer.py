"""The synchronizer over real ranks and reducers: bitwise the reference where sums are exact."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_muloco.comm.consistency import check_equal
from megatron_muloco.comm.reducers import ReplicaSum, build_plain_reducer_for
from megatron_muloco.config.outer import Steps
from megatron_muloco.outer.reference import Parameters, Reference, Settings
from megatron_muloco.outer.synchronizer import ReplicaPort
from tests.support.replicas import Replica, synchronizer_of, whole_shard
from tests.support.spawn import run_ranks
from tests.support.tensors import assert_equal, integer_tensor

CPU = torch.device("cpu")
SIZES = {"a": 5, "b": 3, "c": 4}
KINDS: dict[str, dict[str, Any]] = {"all-reduce": {}, "deterministic": {"deterministic": True}}
OVERLAPS: dict[str, dict[str, Any]] = {
    "blocking": {},
    "fragments": {"fragments": [["a"], ["b"], ["c"]]},
    "overlap": {"overlap_steps": 1, "mixing_weight": 0.5},
    "streaming": {
        "fragments": [["a"], ["b", "c"]],
        "overlap_steps": 2,
        "additive": True,
    },
    # Rounds that end after 3, 7 and 11 steps; 1 and 0 cost no bits behind the point.
    "schedules": {
        "sync_interval": Steps(kind="steps", values=((1, 3), (2, 4))),
        "outer_lr": Steps(kind="steps", values=((1, 0.5), (2, 1.0), (3, 0.5))),
        "outer_momentum": Steps(kind="steps", values=((1, 0.5), (3, 0.0))),
        "fragments": [["a"], ["b"], ["c"]],
        "overlap_steps": 1,
        "mixing_weight": 0.5,
    },
}


def start() -> Parameters:
    return {name: integer_tensor(size, seed=size) for name, size in SIZES.items()}


def integer_steps(replica: int, t: int, name: str, size: int) -> Tensor:
    return integer_tensor(size, seed=1000 * replica + 10 * t + len(name))


def inner(replica: int) -> Any:
    def step(local: Parameters, t: int) -> None:
        for name, tensor in local.items():
            tensor.sub_(integer_steps(replica, t, name, tensor.numel()))

    return step


def settings(overlap: str, **changes: Any) -> Settings:
    # eta, mu and alpha are 1/2 and K is 2 or 4: in ten steps of at most 2**3 each, numbers below
    # 2**8 gain at most 4 bits a round behind the point, so three rounds are exact in 24 bits.
    base = Settings(
        sync_interval=4,
        train_iters=10,
        fragments=[["a", "b", "c"]],
        outer_lr=0.5,
        outer_momentum=0.5,
    )
    return replace(base, **OVERLAPS[overlap], **changes)


def train(
    kind: str, s: Settings, same_data: bool, save_often: bool = False
) -> tuple[Parameters, Parameters]:
    """One rank a replica, through the whole run."""
    rank, size = dist.get_rank(), dist.get_world_size()
    replica = Replica(start())
    group = dist.group.WORLD
    reducer = build_plain_reducer_for(group, CPU, **KINDS[kind])
    plain = build_plain_reducer_for(group, CPU)
    synchronizer = synchronizer_of(replica.port(), s, reducer, size, plain)
    step = inner(0 if same_data else rank)
    for t in range(1, s.train_iters + 1):
        step(replica.parameters, t)
        if synchronizer.after_inner_step(t) is not None:
            check_equal(synchronizer.anchors(), group, CPU, what="the anchor", round_index=t)
        if save_often:
            synchronizer.state_dict()
    synchronizer.flush()
    return dict(synchronizer.anchors()), replica.parameters


def assert_same(actual: Parameters, expected: Parameters, message: str) -> None:
    for name, tensor in expected.items():
        assert_equal(actual[name], tensor, f"{message}, {name}")


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_replicas", [2, 4])
def test_a_spawned_run_is_the_reference(num_replicas: int, kind: str, overlap: str) -> None:
    s = settings(overlap)
    reference = Reference(start(), [inner(k) for k in range(num_replicas)], s)
    reference.run()
    for k, (anchor, local) in enumerate(run_ranks(train, num_replicas, kind, s, False)):
        assert_same(anchor, reference.anchor, f"anchor of replica {k}")
        assert_same(local, reference.local[k], f"local parameters of replica {k}")


@pytest.mark.parametrize("kind", KINDS)
def test_saving_while_fragments_are_in_flight_changes_nothing(kind: str) -> None:
    # Saving waits; the results must outlive the launches that reuse the reducer's buffers.
    s = replace(settings("fragments"), overlap_steps=3)
    reference = Reference(start(), [inner(k) for k in range(2)], s)
    reference.run()
    for anchor, _ in run_ranks(train, 2, kind, s, False, True):
        assert_same(anchor, reference.anchor, "anchor")


@pytest.mark.parametrize("kind", KINDS)
def test_three_replicas_stay_equal_though_thirds_are_rounded(kind: str) -> None:
    """The digests inside the run compare bits; here the values, loosely bounded by rounding."""
    s = settings("streaming")
    reference = Reference(start(), [inner(k) for k in range(3)], s)
    reference.run()
    first, *others = run_ranks(train, 3, kind, s, False)
    for name, expected in reference.anchor.items():
        for other in others:
            assert_equal(other[0][name], first[0][name], name)
        # About ten operations a round, three rounds, numbers below 2**7, half an ulp (6e-8) each.
        assert (first[0][name] - expected).abs().max() <= 3 * 10 * 2**7 * 6e-8


@pytest.mark.parametrize(("num_replicas", "kind"), [(2, "all-reduce"), (4, "deterministic")])
def test_replicas_on_the_same_data_are_one_replica(num_replicas: int, kind: str) -> None:
    s = settings("streaming", outer_lr=0.7, outer_momentum=0.9)
    alone = Reference(start(), [inner(0)], s)
    alone.run()
    for anchor, local in run_ranks(train, num_replicas, kind, s, True):
        assert_same(anchor, alone.anchor, "anchor")
        assert_same(local, alone.local[0], "local")


def cut_port(rank: int, parameters: Parameters, group: Any) -> ReplicaPort:
    """Rank 0 of a replica of two holds 'a' and owns 'norm'; rank 1 holds 'b' and a copy of it."""
    own = "a" if rank == 0 else "b"
    masters = {own: parameters[own], "norm": parameters["norm"]}

    def broadcast(names: Any) -> None:
        assert "norm" in names
        dist.broadcast(masters["norm"], group=group, group_src=0)

    return ReplicaPort(
        device=CPU,
        shards=[
            whole_shard(own, masters[own]),
            whole_shard("norm", masters["norm"], is_primary=rank == 0),
        ],
        masters=masters,
        total=ReplicaSum(group),
        broadcast_replicated=broadcast,
        publish=lambda: None,
    )


def train_cut(bad_step: int | None) -> tuple[int, Parameters, list[Any]]:
    """Two replicas of two ranks; replica 1 meets a NaN on one rank, in the shard 'b'."""
    rank = dist.get_rank()
    replica, position = divmod(rank, 2)
    in_replica = [dist.new_group([0, 1]), dist.new_group([2, 3])][replica]
    outer = [dist.new_group([0, 2]), dist.new_group([1, 3])][position]
    parameters = {"a": torch.zeros(3), "b": torch.zeros(2), "norm": torch.zeros(1)}
    port = cut_port(position, parameters, in_replica)
    s = Settings(sync_interval=2, train_iters=4, fragments=[["a", "b", "norm"]])
    synchronizer = synchronizer_of(port, s, build_plain_reducer_for(outer, CPU), 2)
    seen = []
    for t in range(1, 5):
        for tensor in port.masters.values():
            tensor.sub_(1.0 + 2.0 * replica)
        if t == bad_step and replica == 1 and position == 1:
            port.masters["b"].fill_(math.nan)
        report = synchronizer.after_inner_step(t)
        if report is not None:
            (fragment,) = report.applied
            seen.append(
                (
                    report.restarted_from_anchor,
                    fragment.weights.tolist(),
                    fragment.metrics()["muloco/pseudogradient_norm"],
                )
            )
    return replica, dict(port.masters), seen


def test_norms_count_every_rank_of_a_replica_and_duplicates_once() -> None:
    for replica, masters, seen in run_ranks(train_cut, 4, None):
        # Each of 3 + 2 + 1 elements moved by 2 or 6 in a round; the copy of 'norm' is not counted.
        norm = (2.0 + 4.0 * replica) * math.sqrt(6)
        for restarted_from_anchor, weights, measured in seen:
            assert (restarted_from_anchor, weights) == (False, [1.0, 1.0])
            assert measured == pytest.approx(norm)
        for name, tensor in masters.items():
            assert tensor.tolist() == [-8.0] * tensor.numel(), name


def test_one_bad_shard_takes_its_whole_replica_out() -> None:
    for replica, masters, seen in run_ranks(train_cut, 4, 2):
        assert [restarted_from_anchor for restarted_from_anchor, _, _ in seen] == [
            replica == 1,
            False,
        ]
        assert [weights for _, weights, _ in seen] == [[1.0, 0.0], [1.0, 1.0]]
        for name, tensor in masters.items():
            # Round 1: replica 0 alone, -2. Round 2: the mean of 2 and 6.
            assert tensor.tolist() == [-6.0] * tensor.numel(), name
