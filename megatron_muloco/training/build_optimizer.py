"""`wrap_optimizer`: builds the inner optimizer and the outer step on Megatron's optimizer.

The order matters. Megatron's distributed optimizer decides which flat ranges of the parameters have
their master weights on this rank. The inner optimizer is bound to these shards. The outer step
copies its first anchor from them.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig

from megatron_muloco.comm.background import beside_training
from megatron_muloco.comm.chunking import row_places
from megatron_muloco.comm.collectives import AllToAll, ReplicatedBroadcast, gather_objects
from megatron_muloco.comm.compressed import build_compressed_reducer_for
from megatron_muloco.comm.consistency import check_equal, check_same_shards
from megatron_muloco.comm.groups import Groups
from megatron_muloco.comm.in_process import InProcessGroup
from megatron_muloco.comm.reducers import PhasedReducer, ReplicaSum, build_plain_reducer_for
from megatron_muloco.config import RunConfig
from megatron_muloco.config.derived import Derived, derive, sketch_width
from megatron_muloco.config.inner import MuonConfig, MuonInner, learning_rate
from megatron_muloco.config.outer import (
    NoCompression,
    NoOuter,
    SynchronizedOuter,
)
from megatron_muloco.errors import RuntimeMismatch
from megatron_muloco.monitor.pseudogradients import build_recorder
from megatron_muloco.optim.exchange import ShardExchange
from megatron_muloco.optim.matrices import LayerShape, always_plain, implementation_for, is_vector
from megatron_muloco.optim.muon import DTYPES, MatrixUpdate, Muon, MuonAdamW
from megatron_muloco.optim.parameter_table import ParameterTable, build_parameter_table
from megatron_muloco.optim.routing import RankShards
from megatron_muloco.outer.diagnostics import PseudogradientSketch
from megatron_muloco.outer.fragments import FragmentPlan
from megatron_muloco.outer.guard import Guard
from megatron_muloco.outer.optimizer import Additive, Mix, OuterNesterov, OuterOptimizer
from megatron_muloco.outer.reducer import Reducer
from megatron_muloco.outer.schedule import SyncSchedule
from megatron_muloco.outer.synchronizer import ReplicaPort, Synchronizer
from megatron_muloco.params import GPT_NAMES, ParameterNames, Shard
from megatron_muloco.runtime.accelerator import training_device
from megatron_muloco.runtime.megatron import (
    MasterView,
    build_distributed_optimizer,
    find_distributed_optimizer,
    keep_statistics_inside,
)
from megatron_muloco.training.replica_optimizer import OuterChecks, ReplicaOptimizer, WeightChecks

__all__ = ["build_reducer", "build_replica_optimizer", "wrap_optimizer"]


def wrap_optimizer(
    optimizer: Any,
    model: DistributedDataParallel,
    config: RunConfig,
    groups: Groups,
    *,
    names: ParameterNames = GPT_NAMES,
    matrix_update: MatrixUpdate | None = None,
    outer_optimizer: OuterOptimizer | None = None,
) -> ReplicaOptimizer:
    """Return a wrapper of ``optimizer`` whose ``step()`` also makes the outer steps that are due.

    The inner optimizer that Megatron created (apex's, Transformer Engine's or torch's Adam) is
    replaced by the one that ``config.inner`` describes, on the same shards.

    Args:
        optimizer: The result of ``get_megatron_optimizer``, or a `DistributedOptimizer`.
        model: This rank's pipeline stage, wrapped with ``use_distributed_optimizer=True``.
        config: The configuration of the run.
        groups: The process groups from `initialize_replicas`.
        names: Names of the model's parameters, for an architecture other than ``GPTModel``.
        matrix_update: Replaces `Muon` where ``inner.kind`` is muon. Of ``inner.muon``, the keys of
            the exchange and ``split_heads`` still apply.
        outer_optimizer: Replaces `OuterNesterov`, and with it ``lr`` and ``momentum`` of
            ``config.outer``. It must be equal on all ranks, also after a resume.

    Raises:
        RuntimeMismatch: The optimizer has no master weights that this package knows, a parameter
            has no rule (see `ParameterTable`), equal positions hold different shards, a
            ``matrix_update`` would have no matrices, or an ``outer_optimizer`` no outer step.
        SyncError: Replicas start from different weights.

    Collectives: object gathers over dp x cp, stage and outer groups, and 8 bytes per parameter over
    the outer group; every rank of the job calls it at the same point.
    """
    distributed = find_distributed_optimizer(optimizer)
    _check_clipping(distributed, config)
    keep_statistics_inside(distributed, groups)
    view = MasterView(model, distributed, groups, names)
    inner = _build_inner_optimizer(view, config, groups, matrix_update)
    distributed.optimizer = inner
    derived = derive(config, groups.topology)
    synchronizer, checks = _build_outer_step(view, config, derived, groups, outer_optimizer)
    weight_checks = WeightChecks(
        view,
        groups.pg.intra_dp_cp,
        training_device(),
        interval=config.training.check_weight_hash_across_dp_replicas_interval,
    )
    return ReplicaOptimizer(
        optimizer, view, inner, synchronizer, checks, weight_checks, config, derived
    )


def build_replica_optimizer(
    model: DistributedDataParallel,
    config: RunConfig,
    groups: Groups,
    *,
    names: ParameterNames = GPT_NAMES,
    matrix_update: MatrixUpdate | None = None,
    outer_optimizer: OuterOptimizer | None = None,
) -> ReplicaOptimizer:
    """Build Megatron's distributed optimizer for ``model`` and wrap it; see `wrap_optimizer`."""
    # Megatron makes master weights and moments for some torch optimizer. `wrap_optimizer` replaces
    # this one before its first step.
    placeholder = torch.optim.AdamW(
        [parameter for parameter in model.module.parameters() if parameter.requires_grad],
        lr=config.inner.lr,
    )
    distributed = build_distributed_optimizer(
        model, groups, placeholder, _build_optimizer_config(config)
    )
    return wrap_optimizer(
        distributed,
        model,
        config,
        groups,
        names=names,
        matrix_update=matrix_update,
        outer_optimizer=outer_optimizer,
    )


def _build_optimizer_config(config: RunConfig) -> OptimizerConfig:
    """Return Megatron's optimizer configuration for a run."""
    bf16 = config.training.precision == "bf16"
    return OptimizerConfig(
        optimizer="adam",
        lr=config.inner.lr,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=True,
        overlap_param_gather=config.training.overlap_param_gather,
        clip_grad=config.training.clip_grad,
        log_num_zeros_in_grad=False,
    )


def _check_clipping(optimizer: DistributedOptimizer, config: RunConfig) -> None:
    """Raise RuntimeMismatch if Megatron's ``clip_grad`` differs from the configuration's."""
    theirs, ours = optimizer.config.clip_grad, config.training.clip_grad
    if theirs != ours:
        raise RuntimeMismatch(
            f"Megatron's OptimizerConfig has clip_grad {theirs}, but training.clip_grad is {ours}, "
            "so the run would not be the one that the configuration describes. Set both to the "
            "same value."
        )


# ---- inner optimizer ---------------------------------------------------------------------


def _build_inner_optimizer(
    view: MasterView, config: RunConfig, groups: Groups, matrix_update: MatrixUpdate | None
) -> MuonAdamW:
    """Build the inner optimizer on this rank's shards.

    It has one parameter group for each pair of multipliers (learning rate, weight decay).
    """
    if isinstance(config.inner, MuonInner):
        accelerator = torch.cuda.is_available()
        matrix_update = matrix_update or Muon(config.inner.muon, accelerator=accelerator)
    elif matrix_update is not None:
        raise RuntimeMismatch(
            "matrix_update was given, but inner.kind is adamw, so it would update no parameter. "
            "Use inner.kind: muon."
        )
    table = _build_stage_table(view, config, groups)
    adam = config.inner.adam
    multipliers = {row.name: (row.lr_mult, row.wd_mult) for row in table.rows}
    kinds = list(dict.fromkeys(multipliers.values()))
    inner = MuonAdamW(
        [{"params": [], "lr_mult": lr_mult, "wd_mult": wd_mult} for lr_mult, wd_mult in kinds],
        lr=config.inner.lr,
        betas=(adam.beta1, adam.beta2),
        eps=adam.eps,
        matrix_update=matrix_update,
    )
    pairs = [(view.raw_masters[shard.name], shard) for shard in view.shards]
    for tensor, shard in pairs:
        # Not by add_param_group: torch refuses fp32 masters, which are views of parameters.
        inner.param_groups[kinds.index(multipliers[shard.name])]["params"].append(tensor)
    exchange = None
    if isinstance(config.inner, MuonInner) and table.matrices:
        exchange = _build_exchange(view, table, groups, config.inner.muon)
    inner.bind(pairs, table, exchange)
    return inner


def _build_stage_table(view: MasterView, config: RunConfig, groups: Groups) -> ParameterTable:
    """Build the parameter table of this pipeline stage: routes, matrices, owners, multipliers."""
    muon = config.inner.muon if isinstance(config.inner, MuonInner) else None
    vector, topology = config.inner.vector, groups.topology
    return build_parameter_table(
        list(view.infos.values()),
        LayerShape.from_config(config.model),
        kind=config.inner.kind,
        tensor_size=topology.tensor,
        group_size=groups.stage.size(),
        num_ns_steps=muon.num_ns_steps if muon else 0,
        split_heads=muon is not None and muon.split_heads,
        choose_impl=implementation_for(muon, accelerator=torch.cuda.is_available())
        if muon
        else always_plain,
        multipliers={
            name: (vector.lr_mult, vector.weight_decay_mult)
            for name, info in view.infos.items()
            if is_vector(info)
        },
    )


def _build_exchange(
    view: MasterView,
    table: ParameterTable,
    groups: Groups,
    muon: MuonConfig,
) -> ShardExchange:
    """Build the exchange of shards with the owner ranks of this pipeline stage.

    Collectives: one object gather over the stage group.
    """
    stage = groups.stage
    mine = RankShards(
        tensor_rank=groups.coords.tp,
        ranges={shard.name: (shard.start, shard.end) for shard in view.shards},
    )
    return ShardExchange(
        table.matrices,
        table.assignment.owners,
        gather_objects(stage, mine),
        rank=stage.rank(),
        transport=AllToAll(stage) if stage.size() > 1 else None,
        wire_dtype=DTYPES[muon.wire_dtype(accelerator=torch.cuda.is_available())],
        device=training_device(),
        buckets=muon.exchange_chunks,
    )


# ---- outer step --------------------------------------------------------------------------


def _build_outer_step(
    view: MasterView,
    config: RunConfig,
    derived: Derived,
    groups: Groups,
    optimizer: OuterOptimizer | None,
) -> tuple[Synchronizer, OuterChecks] | tuple[None, None]:
    """Build the outer step on this rank's master weights, and its checks; ``None`` without one.

    Collectives: object gathers over the outer group and over the ranks that hold replicated
    parameters, and the digests of all masters over the outer group.
    """
    outer = config.outer
    if isinstance(outer, NoOuter):
        if optimizer is not None:
            raise RuntimeMismatch(
                "wrap_optimizer was given an outer_optimizer, but outer.kind is none, so it would "
                "never be used. Use outer.kind nesterov or average, or pass no outer_optimizer."
            )
        return None, None
    if optimizer is None:
        optimizer = OuterNesterov(lr=outer.lr, momentum=outer.momentum)
    device = training_device()
    # Before anything is built: a launch with different shards would mix parameters, and a first
    # pseudogradient from different anchors would be meaningless.
    check_same_shards(groups.outer, view.shards)
    check_equal(view.masters, groups.outer, device, what="the initial value", round_index=0)
    tied = None if config.model.untie_embeddings_and_output_weights else view.names.embedding
    replicated = ReplicatedBroadcast(groups, view.shards, view.masters, tied_name=tied)
    port = ReplicaPort(
        device=device,
        shards=view.shards,
        masters=view.masters,
        total=ReplicaSum(groups.replica),
        broadcast_replicated=replicated,
        publish=view.publish,
    )
    schedule = SyncSchedule.from_config(outer, derived.train_iters)
    plan = FragmentPlan.from_config(outer, view.infos.values(), num_layers=config.model.num_layers)
    synchronizer = Synchronizer(
        port,
        plan,
        schedule,
        optimizer,
        Additive() if outer.apply == "additive" else Mix(outer.effective_mixing_weight),
        build_reducer(outer, groups, device, view.shards),
        _build_flush_reducer(outer, groups, device),
        Guard(
            num_replicas=groups.topology.num_replicas,
            max_norm_ratio=outer.guard.max_norm_ratio or float("inf"),
            min_usable=outer.guard.min_usable_replicas,
            max_empty_rounds=outer.guard.max_empty_rounds,
        ),
        state_device=torch.device("cpu") if outer.state_device == "cpu" else None,
        sketch=_build_sketch(config, groups),
        # The rates that `ReplicaOptimizer` sets.
        learning_rate=partial(learning_rate, config.inner, derived.train_iters),
        weigh_by_tokens=outer.weighting == "tokens",
        observer=build_recorder(config, view.shards, schedule, groups.coords, groups.topology),
    )
    checks = OuterChecks(
        {"the anchor": synchronizer.anchors(), "the outer momentum": synchronizer.momenta()},
        replicated,
        plan.fragments,
        groups.outer,
        device,
        interval=config.monitor.digest_interval,
        debug=config.monitor.debug_digests,
    )
    return synchronizer, checks


def build_reducer(
    outer: SynchronizedOuter, groups: Groups, device: torch.device, shards: Sequence[Shard]
) -> Reducer:
    """Build the reducer for pseudogradients of ``shards``."""
    compression = outer.compression
    if isinstance(compression, NoCompression):
        reducer: PhasedReducer = build_plain_reducer_for(
            groups.exchange,
            device,
            wire_dtype=compression.wire_dtype,
            deterministic=compression.deterministic,
            through_host=outer.sends_from_host,
        )
    else:
        reducer = build_compressed_reducer_for(
            groups.exchange,
            device,
            compression,
            row_places(shards),
            {shard.name: shard.param.kind for shard in shards},
            through_host=outer.sends_from_host,
        )
    # Replicas of one process take turns. A thread that waits for another replica beside them would
    # wait for ever.
    if not outer.reduces_beside_training or isinstance(groups.exchange, InProcessGroup):
        return reducer
    return beside_training(reducer, device, overlap_steps=outer.overlap_steps)


def _build_flush_reducer(outer: SynchronizedOuter, groups: Groups, device: torch.device) -> Reducer:
    """Build the reducer for the flush: an uncompressed fp32 mean.

    It is deterministic unless the run's own reducer is an all-reduce, whose order of summation
    depends on the library.
    """
    compression = outer.compression
    return build_plain_reducer_for(
        groups.exchange,
        device,
        deterministic=not isinstance(compression, NoCompression) or compression.deterministic,
        through_host=outer.sends_from_host,
    )


def _build_sketch(config: RunConfig, groups: Groups) -> PseudogradientSketch | None:
    """Build the sketch that compares replicas; ``None`` where they are not compared."""
    width = sketch_width(config, groups.topology)
    return PseudogradientSketch(width, config.monitor.pseudogradient_interval) if width else None
