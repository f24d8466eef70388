"""Process groups of a K-replica job: `build_groups` creates them, `Groups` holds this rank's.

Every group is a set of ranks that differ only in some axes of the topology. Megatron gets the
groups inside a replica as one `ProcessGroupCollection`. This package adds the *outer group* (the K
ranks with the same position in their replicas) and the *stage group* (the ranks of one pipeline
stage of one replica, which share its matrices).
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_muloco.topology import Axis, Coords, Topology

__all__ = ["Groups", "build_groups"]

# Field of ProcessGroupCollection -> axes that vary inside the group. There are no experts, so the
# expert-parallel group has one rank and the expert fields repeat the dense ones.
_FIELDS: dict[str, tuple[Axis, ...]] = {
    "tp": ("tp",),
    "cp": ("cp",),
    "dp": ("dp",),
    "pp": ("pp",),
    "mp": ("tp", "pp"),
    "tp_cp": ("tp", "cp"),
    "dp_cp": ("cp", "dp"),
    "intra_dp_cp": ("cp", "dp"),
    "tp_dp_cp": ("tp", "cp", "dp"),
    "tp_dp": ("tp", "dp"),
    "ep": (),
    "expt_tp": ("tp",),
    "tp_ep": ("tp",),
    "tp_ep_pp": ("tp", "pp"),
    "expt_dp": ("cp", "dp"),
    "intra_expt_dp": ("cp", "dp"),
    # The optimizer's statistics group: the whole replica. None would mean WORLD to Megatron and mix
    # the gradient norms of all replicas.
    "intra_dist_opt": ("tp", "cp", "dp", "pp"),
}
# Fields that both Megatron versions read, so they must be set, though nothing here uses them.
_UNUSED_FIELDS = ("hcp", "inter_dist_opt")
# Fields that only newer versions declare (0.17 on). Rematerialised weight sharding ("gtp_remat") is
# an axis of size one here, so groups with it are those without it. The separate all-gather groups
# ("_ag") are communicators of Megatron's FSDP, which is not used.
_NEWER_FIELDS: dict[str, tuple[Axis, ...]] = {
    "dp_cp_gtp_remat": ("cp", "dp"),
    "expt_dp_gtp_remat": ("cp", "dp"),
    "tp_ep_pp_with_egtp_remat": ("tp", "pp"),
    "gtp_remat": (),
    "expt_gtp_remat": (),
}
_NEWER_UNUSED_FIELDS = ("dp_cp_ag", "expt_dp_ag")


@dataclass(frozen=True)
class Groups:
    """This rank's groups.

    Attributes:
        topology: Topology of the whole job.
        coords: This rank's place in the topology.
        pg: Groups inside this replica, for Megatron.
        outer: The K ranks with this position, in replica order.
        exchange: The same ranks with a separate communicator, used for pseudogradients only. A
            communication thread may use it while the main thread uses ``outer``: collectives of
            one communicator are matched by order, and the order of two threads differs from rank
            to rank.
        stage: The tp x cp x dp ranks of this pipeline stage of this replica.
        replica: All ranks of this replica.
    """

    topology: Topology
    coords: Coords
    pg: ProcessGroupCollection
    outer: Any
    exchange: Any
    stage: Any
    replica: Any

    @property
    def is_leader(self) -> bool:
        """Whether this rank is the first of its replica."""
        return bool(self.replica.rank() == 0)

    @property
    def on_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.coords.pp == 0

    @property
    def on_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.coords.pp == self.topology.pipeline - 1


class _GroupBuilder:
    """Creates each distinct group once; axes of size one do not lead to a new group."""

    def __init__(self, topology: Topology, timeout: timedelta, backend: str | None) -> None:
        self._topology = topology
        self._options: dict[str, Any] = {"timeout": timeout, "backend": backend}
        self._built: dict[tuple[tuple[int, ...], ...], Any] = {}

    def over(self, *axes: Axis) -> Any:
        """Return the group of the ranks that differ from this one only in ``axes``."""
        return self.from_lists(tuple(self._topology.groups(*axes)))

    def from_lists(self, lists: tuple[tuple[int, ...], ...]) -> Any:
        """Return the group among ``lists`` that contains this rank, or ``None``."""
        if lists not in self._built:
            self._built[lists] = self._new(lists, self._options)
        return self._built[lists]

    def another(self, *axes: Axis, backend: str | None) -> Any:
        """Return a group of the same ranks as `over`, with a separate communicator."""
        chosen = {"backend": backend} if backend else {}
        return self._new(tuple(self._topology.groups(*axes)), self._options | chosen)

    def _new(self, lists: tuple[tuple[int, ...], ...], options: dict[str, Any]) -> Any:
        # new_group is a collective over the whole job: every rank takes part in the creation of
        # every group, also of those it does not belong to, in the same order.
        mine = None
        for ranks in lists:
            group = torch.distributed.new_group(list(ranks), **options)
            if torch.distributed.get_rank() in ranks:
                mine = group
        return mine


def build_groups(
    topology: Topology,
    *,
    timeout: timedelta,
    backend: str | None = None,
    exchange_backend: str | None = None,
) -> Groups:
    """Create every process group of the job.

    Collectives: every rank of the job must call it at the same point, because the groups must be
    created in the same order everywhere.

    Args:
        topology: Topology of the job; its size must be the world size.
        timeout: Time limit of a collective in these groups. Torch's default of 30 minutes would
            hide a dead peer for too long.
        backend: Backend of the groups; ``None`` takes that of the default group.
        exchange_backend: Backend of `Groups.exchange`: ``gloo`` where pseudogradients are sent from
            host memory, else ``None`` for the same as the others.
    """
    build = _GroupBuilder(topology, timeout, backend)
    pg = ProcessGroupCollection()
    for field, axes in _FIELDS.items():
        setattr(pg, field, build.over(*axes))
    for field in _UNUSED_FIELDS:
        setattr(pg, field, None)
    declared = getattr(ProcessGroupCollection, "__dataclass_fields__", {})
    for field, axes in _NEWER_FIELDS.items():
        if field in declared:
            setattr(pg, field, build.over(*axes))
    for field in _NEWER_UNUSED_FIELDS:
        if field in declared:
            setattr(pg, field, None)
    pipelines = topology.groups("pp")
    ends = tuple(tuple(sorted({ranks[0], ranks[-1]})) for ranks in pipelines)
    pg.embd = build.from_lists(ends)
    pg.pos_embd = build.from_lists(tuple((ranks[0],) for ranks in pipelines))
    return Groups(
        topology=topology,
        coords=topology.coords(torch.distributed.get_rank()),
        pg=pg,
        outer=build.over("replica"),
        exchange=build.another("replica", backend=exchange_backend),
        stage=build.over("tp", "cp", "dp"),
        replica=build.over("tp", "cp", "dp", "pp"),
    )
