"""Process groups of a K-replica job: `build_groups` creates them, `Groups` holds this rank's.

Every group is a set of ranks that differ only in some axes of the topology. Megatron gets the
groups inside a replica as one `ProcessGroupCollection`. This package adds the *outer group* (the K
ranks with the same position in their replicas) and the *stage group* (the ranks of one pipeline
stage of one replica, which share its matrices). All groups of one rank are one group.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_muloco.comm.alone import make_alone
from megatron_muloco.topology import Axis, Coords, Topology

__all__ = [
    "NAMED_AXES",
    "Groups",
    "build_control",
    "build_groups",
    "groups_made",
    "sends_from_host",
]

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

NAMED_AXES: dict[str, tuple[Axis, ...]] = {
    "tensor-parallel group": ("tp",),
    "context-parallel group": ("cp",),
    "data-parallel group": ("dp",),
    "dp x cp group": ("cp", "dp"),
    "pipeline group": ("pp",),
    "tp x dp x cp group": ("tp", "cp", "dp"),
    "replica": ("tp", "cp", "dp", "pp"),
    "outer group": ("replica",),
    "exchange group": ("replica",),
}
"""Name of a group in messages -> the axes that vary inside it; in the order of `Groups.by_name`."""


@dataclass(frozen=True)
class Groups:
    """This rank's groups.

    Attributes:
        topology: Topology of the whole job.
        coords: This rank's place in the topology.
        pg: Groups inside this replica, for Megatron.
        outer: The K ranks with this position, in replica order.
        exchange: The same ranks, used for pseudogradients only; with a separate communicator where
            a reduction continues beside training or is sent from host memory. A communication
            thread may then use it while the main thread uses ``outer``: collectives of one
            communicator are matched by order, and the order of two threads differs from rank to
            rank.
        stage: The tp x cp x dp ranks of this pipeline stage of this replica.
        replica: All ranks of this replica.
        control: All ranks of the job, with a host backend and a time limit of its own, for small
            objects: agreements, checkpoint planning, the end of the job.
    """

    topology: Topology
    coords: Coords
    pg: ProcessGroupCollection
    outer: Any
    exchange: Any
    stage: Any
    replica: Any
    control: Any

    def by_name(self) -> dict[str, Any]:
        """Return this rank's groups by their names in messages, those of `NAMED_AXES`."""
        pg = self.pg
        found = (pg.tp, pg.cp, pg.dp, pg.dp_cp, pg.pp)
        others = (self.stage, self.replica, self.outer, self.exchange)
        return dict(zip(NAMED_AXES, (*found, *others), strict=True))

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
    """Creates each distinct group once, and one group for everything that this rank does alone.

    Creation is local: a rank makes the groups that it belongs to, one `new_group` for each division
    of the job, and knows nothing of the others. If the default group is bound to a device, the
    divisions become one split of its communicator each. torch derives the name of such a group from
    its ranks and from the number of groups that the process already has, so all ranks make the same
    number in the same order.
    """

    def __init__(self, topology: Topology, timeout: timedelta, backend: str | None) -> None:
        self._topology, self._rank = topology, torch.distributed.get_rank()
        self._options: dict[str, Any] = {"timeout": timeout, "backend": backend}
        self._built: dict[tuple[int, ...], Any] = {}
        self.alone = make_alone(self._rank)

    def over(self, *axes: Axis) -> Any:
        """Return the group of the ranks that differ from this one only in ``axes``."""
        ranks = self._topology.group_of(self._rank, *axes)
        if len(ranks) == 1:
            return self.alone
        if ranks not in self._built:
            self._built[ranks] = self._own(ranks, self._options)
        return self._built[ranks]

    def another(self, *axes: Axis, backend: str | None) -> Any:
        """Return a group of the same ranks as `over`, with a separate communicator."""
        ranks = self._topology.group_of(self._rank, *axes)
        if len(ranks) == 1:
            return self.alone
        return self._own(ranks, self._options | ({"backend": backend} if backend else {}))

    def ends(self) -> Any:
        """Return the group of the first and the last stage; ``None`` between them.

        It is built last: stages between the two have one group less from here on.
        """
        if self._topology.pipeline <= 2:
            return self.over("pp")
        # Ranks without a group take part as well: if the default group is bound to a device, each
        # group is a split of its communicator, which is a collective of the whole job.
        mine = None
        for ranks in self._topology.groups("pp"):
            group = torch.distributed.new_group([ranks[0], ranks[-1]], **self._options)
            if self._rank in (ranks[0], ranks[-1]):
                mine = group
        return mine

    @staticmethod
    def _own(ranks: tuple[int, ...], options: dict[str, Any]) -> Any:
        return torch.distributed.new_group(list(ranks), **options, use_local_synchronization=True)


def build_control(timeout: timedelta) -> Any:
    """Create the group of `Groups.control`.

    Over NCCL such messages would be device tensors, and a gather to rank 0 would open a connection
    to every rank. They also wait for file systems, longer than a training step may wait.

    Collectives: every rank of the job calls it at the same point.

    Args:
        timeout: Time limit of a message.
    """
    return torch.distributed.new_group(backend="gloo", timeout=timeout)


def sends_from_host(group: Any) -> bool:
    """Return whether the backend of a group sends from host memory, and not from an accelerator."""
    return bool(torch.distributed.get_backend(group) == "gloo")


def groups_made() -> int:
    """Return how many process groups this process is in, the default group included.

    torch gives no public access to it, but derives the names of new groups from it.
    """
    return len(torch.distributed.distributed_c10d._world.pg_names)


def build_groups(
    topology: Topology,
    *,
    control: Any,
    timeout: timedelta,
    backend: str | None = None,
    exchange_backend: str | None = None,
    separate_exchange: bool = True,
) -> Groups:
    """Create every process group of this rank.

    The number of `new_group` calls of a rank does not grow with the job: at most one for each
    division of the job into groups. A pipeline of three or more stages adds one for each pipeline
    of the job, for the pairs of its first and last stage.

    Collectives: every rank of the job must call it at the same point, because the groups must be
    created in the same order everywhere. `groups_made` must be the same on all ranks before.

    Args:
        topology: Topology of the job; its size must be the world size.
        control: What `build_control` returned.
        timeout: Time limit of a collective in these groups. Torch's default of 30 minutes would
            hide a dead peer for too long.
        backend: Backend of the groups; ``None`` takes that of the default group.
        exchange_backend: Backend of `Groups.exchange`: ``gloo`` where pseudogradients are sent from
            host memory, else ``None`` for the same as the others.
        separate_exchange: Whether `Groups.exchange` needs a communicator of its own: collectives of
            pseudogradients are in progress while `Groups.outer` is used, or have another backend.
            If not, it is `Groups.outer`.
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
    outer = build.over("replica")
    exchange = (
        build.another("replica", backend=exchange_backend)
        if separate_exchange or exchange_backend
        else outer
    )
    stage, replica = build.over("tp", "cp", "dp"), build.over("tp", "cp", "dp", "pp")
    coords = topology.coords(torch.distributed.get_rank())
    pg.pos_embd = build.alone if coords.pp == 0 else None
    pg.embd = build.ends()
    return Groups(
        topology=topology,
        coords=coords,
        pg=pg,
        outer=outer,
        exchange=exchange,
        stage=stage,
        replica=replica,
        control=control,
    )
