"""The rank grid is a bijection, and its groups partition the world."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_muloco.errors import TopologyError
from megatron_muloco.topology import Coords, Topology

AXES = ("tp", "cp", "dp", "pp", "replica")
ALL_AXIS_SETS = [axes for size in range(6) for axes in combinations(AXES, size)]


def every_topology_of(world: int) -> list[Topology]:
    """Return all ways to factor a world, context parallelism included."""
    divisors = [d for d in range(1, world + 1) if world % d == 0]
    return [
        Topology(replicas, tp, pp, world // (replicas * tp * pp * cp), cp)
        for replicas in divisors
        for tp in divisors
        for pp in divisors
        for cp in (1, 2)
        if world % (replicas * tp * pp * cp) == 0
    ]


@pytest.mark.parametrize("world", range(1, 65))
def test_every_rank_has_one_place(world: int) -> None:
    for topology in every_topology_of(world):
        places = [topology.coords(rank) for rank in range(world)]
        assert len(set(places)) == world
        assert [topology.rank(place) for place in places] == list(range(world))


@pytest.mark.parametrize("world", range(1, 65))
def test_outer_groups_partition_the_world_by_position(world: int) -> None:
    for topology in every_topology_of(world):
        groups = topology.groups("replica")
        assert sorted(rank for group in groups for rank in group) == list(range(world))
        assert {len(group) for group in groups} == {topology.num_replicas}
        for position, group in enumerate(groups):
            assert {topology.position(rank) for rank in group} == {position}


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    sizes = [draw(st.integers(1, limit)) for limit in (4, 4, 3, 4, 2)]
    return Topology(*sizes)


@given(topologies(), st.sampled_from(ALL_AXIS_SETS))
def test_groups_differ_along_the_named_axes_only(topology: Topology, axes: tuple[str, ...]) -> None:
    groups = topology.groups(*axes)
    assert sorted(rank for group in groups for rank in group) == list(range(topology.world_size))
    for group in groups:
        assert list(group) == sorted(group)
        places = [topology.coords(rank)._asdict() for rank in group]
        for name in AXES:
            values = {place[name] for place in places}
            if name not in axes:
                assert len(values) == 1
        for rank in group:
            assert topology.group_of(rank, *axes) == group


@given(topologies())
def test_ranks_follow_the_formula(topology: Topology) -> None:
    for rank in range(topology.world_size):
        place = topology.coords(rank)
        expected = place.replica
        expected = expected * topology.pipeline + place.pp
        expected = expected * topology.data + place.dp
        expected = expected * topology.context + place.cp
        expected = expected * topology.tensor + place.tp
        assert rank == expected


def test_replicas_are_contiguous() -> None:
    topology = Topology(num_replicas=3, tensor=2, pipeline=2, data=2)
    assert topology.groups("tp", "cp", "dp", "pp") == [
        tuple(range(8)),
        tuple(range(8, 16)),
        tuple(range(16, 24)),
    ]
    assert topology.groups("tp", "cp", "dp")[0] == (0, 1, 2, 3)


def test_picture_of_the_module_docstring() -> None:
    topology = Topology(num_replicas=2, tensor=2, pipeline=1, data=2)
    assert topology.groups("replica") == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert topology.coords(6) == Coords(replica=1, pp=0, dp=1, cp=0, tp=0)


@given(topologies())
def test_from_world_finds_the_data_parallel_size(topology: Topology) -> None:
    found = Topology.from_world(
        topology.world_size,
        num_replicas=topology.num_replicas,
        tensor=topology.tensor,
        pipeline=topology.pipeline,
        context=topology.context,
    )
    assert found == topology


def test_it_prints_the_whole_product() -> None:
    assert str(Topology(16, 4, 2, 8)) == "16 replicas x tp 4 x pp 2 x dp 8 = 1024 ranks"
    assert str(Topology(1, 1, 1, 1)) == "1 replica x tp 1 x pp 1 x dp 1 = 1 rank"
    assert str(Topology(2, 1, 1, 1, 2)) == "2 replicas x tp 1 x pp 1 x cp 2 x dp 1 = 4 ranks"


@pytest.mark.parametrize("world", [96, 129, 1, 0])
def test_a_world_that_does_not_factor_is_explained(world: int) -> None:
    with pytest.raises(TopologyError) as caught:
        Topology.from_world(world, num_replicas=16, tensor=4, pipeline=2)
    message = str(caught.value)
    assert "16 replicas x tp 4 x pp 2 x dp d = 128·d" in message
    assert f"ranks, but there are {world}." in message
    assert "Start a multiple of 128 ranks" in message


def test_wrong_ranks_and_sizes_are_refused() -> None:
    topology = Topology(2, 1, 1, 1)
    with pytest.raises(TopologyError, match="rank 2 is not in a world of 2 ranks"):
        topology.coords(2)
    with pytest.raises(TopologyError, match=r"tp index 1 is outside \[0, 1\)"):
        topology.rank(Coords(0, 0, 0, 0, 1))
    with pytest.raises(TopologyError, match="dp is 0"):
        Topology(1, 1, 1, 0)


def test_sizes_of_parts() -> None:
    topology = Topology(num_replicas=2, tensor=2, pipeline=3, data=4, context=2)
    assert topology.replica_size == 48
    assert topology.stage_size == 16
    assert topology.sharding == 8
    assert len(topology.groups("tp", "cp", "dp")[0]) == topology.stage_size
