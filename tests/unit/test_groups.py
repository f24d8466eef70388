"""How many process groups a job of many ranks makes, counted with a stand-in for torch's."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
import torch

from megatron_muloco.comm import groups as groups_module
from megatron_muloco.comm.groups import Groups, build_control, build_groups
from megatron_muloco.topology import Topology

LAYOUTS = {
    "15b": Topology(num_replicas=16, tensor=4, pipeline=2, data=8),
    "one replica": Topology(num_replicas=1, tensor=4, pipeline=2, data=128),
    "tp 2": Topology(num_replicas=16, tensor=2, pipeline=2, data=16),
    "pp 4": Topology(num_replicas=16, tensor=4, pipeline=4, data=4),
    "dp 1": Topology(num_replicas=128, tensor=8, pipeline=1, data=1),
    "replicas of one rank": Topology(num_replicas=1024, tensor=1, pipeline=1, data=1),
}


@dataclass(frozen=True)
class Made:
    """One call of `new_group`."""

    ranks: tuple[int, ...]
    backend: str | None
    local: bool

    def size(self) -> int:
        """Return the number of members."""
        return len(self.ranks)


def _made_by(
    rank: int, topology: Topology, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[Groups, list[Made]]:
    """Return the groups of one rank of a job without processes, and its calls of `new_group`."""
    calls: list[Made] = []

    def new_group(
        ranks: list[int],
        *,
        timeout: timedelta,
        backend: str | None,
        use_local_synchronization: bool = False,
    ) -> Made | None:
        assert timeout == timedelta(minutes=10)
        calls.append(Made(tuple(ranks), backend, use_local_synchronization))
        return calls[-1] if rank in ranks else None

    monkeypatch.setattr(torch.distributed, "new_group", new_group)
    monkeypatch.setattr(groups_module, "make_alone", lambda rank: Made((rank,), "alone", True))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    return build_groups(topology, control=None, timeout=timedelta(minutes=10), **options), calls


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rank", [0, 1, 517, 1023])
def test_the_number_of_groups_does_not_grow_with_the_job(
    layout: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    topology = LAYOUTS[layout]
    assert topology.world_size == 1024
    _, calls = _made_by(rank, topology, monkeypatch)
    by_all = [call for call in calls if not call.local]
    # tp, dp, pp, tp x pp, stage, replica, outer, exchange.
    assert len(calls) - len(by_all) <= 8
    # The embedding's pairs leave the stages between out, so all ranks make all of them.
    pipelines = topology.world_size // topology.pipeline
    assert len(by_all) == (pipelines if topology.pipeline > 2 else 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_makes_no_group_of_torch_for_what_it_does_alone(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups, calls = _made_by(0, LAYOUTS[layout], monkeypatch)
    assert not [call for call in calls if call.size() == 1]
    alone = groups.pg.cp
    assert alone.ranks == (0,)
    for group in (groups.pg.ep, groups.pg.pos_embd):
        assert group is alone
    every = [groups.outer, groups.exchange, groups.stage, groups.replica]
    every += [getattr(groups.pg, field) for field in ("tp", "dp", "dp_cp", "pp", "mp", "embd")]
    for group in every:
        assert (group is alone) == (group.size() == 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("separate", [False, True])
def test_a_rank_is_in_at_most_eight_communicators(
    layout: str, separate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = 300
    groups, calls = _made_by(rank, LAYOUTS[layout], monkeypatch, separate_exchange=separate)
    # NCCL makes a communicator at the first collective, and nothing is sent through tp x pp: it
    # tells Megatron's parallel state the ranks of a model.
    members = [call for call in calls if rank in call.ranks and call is not groups.pg.mp]
    assert len(members) <= 8
    assert (groups.exchange is groups.outer) == (not separate or groups.outer.size() == 1)


def test_every_rank_makes_its_groups_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch names a local group by its ranks and the number of groups made before."""
    topology = Topology(num_replicas=3, tensor=2, pipeline=2, data=2)
    orders: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for rank in range(topology.world_size):
        _, calls = _made_by(rank, topology, monkeypatch)
        for ranks in {call.ranks for call in calls}:
            places = tuple(index for index, call in enumerate(calls) if call.ranks == ranks)
            orders.setdefault(ranks, set()).add(places)
    assert all(len(places) == 1 for places in orders.values())


def test_pseudogradients_in_host_memory_have_a_communicator_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups, calls = _made_by(
        0, LAYOUTS["15b"], monkeypatch, exchange_backend="gloo", separate_exchange=False
    )
    assert groups.exchange is not groups.outer
    assert [call.ranks for call in calls if call.backend == "gloo"] == [groups.outer.ranks]


def test_small_messages_have_a_host_backend_and_a_limit_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: dict[str, Any] = {}
    monkeypatch.setattr(torch.distributed, "new_group", lambda **given: made.update(given))
    build_control(timedelta(minutes=60))
    assert made == {"backend": "gloo", "timeout": timedelta(minutes=60)}
