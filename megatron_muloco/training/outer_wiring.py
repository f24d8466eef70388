"""Puts the outer step around one rank's masters, each part from its section of the config."""

import torch

from megatron_muloco.comm.digests import check_equal
from megatron_muloco.comm.duplicates import DuplicateBroadcast
from megatron_muloco.comm.groups import Groups
from megatron_muloco.comm.positions import check_same_shards
from megatron_muloco.comm.reducers import ReplicaSum
from megatron_muloco.config import RunConfig
from megatron_muloco.config.derived import Derived
from megatron_muloco.config.outer import AverageOuter, NesterovOuter, NoOuter
from megatron_muloco.model.names import EMBEDDING
from megatron_muloco.outer.fragments import FragmentPlan
from megatron_muloco.outer.guard import Guard
from megatron_muloco.outer.merge import Additive, MergeRule, Mix
from megatron_muloco.outer.optimizer import OuterNesterov
from megatron_muloco.outer.replica import ReplicaPort
from megatron_muloco.outer.schedule import SyncSchedule
from megatron_muloco.outer.sketch import PseudogradientSketch
from megatron_muloco.outer.synchronizer import Synchronizer
from megatron_muloco.planning.outer_traffic import sketch_width
from megatron_muloco.runtime.accelerator import training_device
from megatron_muloco.runtime.megatron import MasterView
from megatron_muloco.training.outer_checks import OuterChecks
from megatron_muloco.training.reducer_wiring import build_plain_reducer, build_reducer

__all__ = ["build_outer_step"]


def build_outer_step(
    view: MasterView, config: RunConfig, derived: Derived, groups: Groups
) -> tuple[Synchronizer, OuterChecks] | tuple[None, None]:
    """Return the outer step over this rank's masters, and what checks it; nothing without one.

    Raises:
        RuntimeMismatch: Ranks at the same position hold different shards.
        SyncError: Replicas start from different weights.

    Collectives: object gathers over the outer group and over duplicates, and the digests of all
    masters over the outer group; every rank calls it at the same point.
    """
    outer = config.outer
    if isinstance(outer, NoOuter):
        return None, None
    device = training_device()
    check_same_shards(groups.outer, view.shards)
    check_equal(view.masters, groups.outer, device, what="the initial value", round_index=0)
    tied = None if config.model.untie_embeddings_and_output_weights else EMBEDDING
    duplicates = DuplicateBroadcast(groups, view.shards, view.masters, tied_name=tied)
    port = ReplicaPort(
        device=device,
        shards=view.shards,
        masters=view.masters,
        total=ReplicaSum(groups.replica),
        broadcast_duplicates=duplicates,
        publish=view.publish,
    )
    synchronizer = Synchronizer(
        port,
        FragmentPlan.by_layer(
            view.infos,
            num_layers=config.model.num_layers,
            count=outer.fragments.count,
            pattern=outer.fragments.pattern,
        ),
        SyncSchedule(
            sync_interval=outer.sync_interval,
            train_iters=derived.train_iters,
            fragment_count=outer.fragments.count,
            overlap_steps=outer.overlap_steps,
        ),
        OuterNesterov(lr=outer.lr, momentum=outer.momentum),
        _merge_rule(outer),
        build_reducer(outer, groups, device, view.shards),
        build_plain_reducer(outer, groups, device),
        Guard(
            num_replicas=groups.topology.num_replicas,
            norm_factor=outer.guard.max_norm_ratio or float("inf"),
        ),
        state_device=torch.device("cpu") if outer.state_device == "cpu" else None,
        sketch=_sketch(config, groups),
        weigh_by_tokens=outer.weighting == "tokens",
    )
    checks = OuterChecks(
        synchronizer.anchors(),
        duplicates,
        groups.outer,
        device,
        interval=config.monitor.digest_interval,
        debug=config.monitor.debug_digests,
    )
    return synchronizer, checks


def _merge_rule(outer: NesterovOuter | AverageOuter) -> MergeRule:
    return Additive() if outer.apply == "additive" else Mix(outer.effective_mixing_weight)


def _sketch(config: RunConfig, groups: Groups) -> PseudogradientSketch | None:
    width = sketch_width(config, groups.topology)
    return PseudogradientSketch(width, config.monitor.pseudogradient_interval) if width else None
