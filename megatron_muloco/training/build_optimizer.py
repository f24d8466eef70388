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

from megatron_muloco.comm.agreement import gather_objects
from megatron_muloco.comm.background import BackgroundReducer
from megatron_muloco.comm.chunking import row_places
from megatron_muloco.comm.collectives import AllToAll
from megatron_muloco.comm.compressed import CompressedAllGather, CompressedAllReduce
from megatron_muloco.comm.consistency import check_equal, check_same_shards
from megatron_muloco.comm.groups import Groups
from megatron_muloco.comm.reducers import ReplicaSum, build_plain_reducer_for
from megatron_muloco.comm.replicated import ReplicatedBroadcast
from megatron_muloco.compress.topk import codec_lookup
from megatron_muloco.config import RunConfig
from megatron_muloco.config.derived import Derived, derive, sketch_width
from megatron_muloco.config.inner import MuonInner
from megatron_muloco.config.outer import (
    AverageOuter,
    NesterovOuter,
    NoCompression,
    NoOuter,
    TopKCompression,
)
from megatron_muloco.errors import RuntimeMismatch
from megatron_muloco.optim.exchange import ShardExchange
from megatron_muloco.optim.matrices import LayerShape, always_plain, is_vector
from megatron_muloco.optim.muon import MuonAdamW, MuonSettings
from megatron_muloco.optim.parameter_table import ParameterTable, build_parameter_table
from megatron_muloco.optim.routing import RankShards
from megatron_muloco.outer.diagnostics import PseudogradientSketch
from megatron_muloco.outer.fragments import FragmentPlan
from megatron_muloco.outer.guard import Guard
from megatron_muloco.outer.optimizer import Additive, MergeRule, Mix, OuterNesterov
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
from megatron_muloco.training.replica_optimizer import OuterChecks, ReplicaOptimizer

__all__ = [
    "build_outer_step",
    "build_plain_reducer",
    "build_reducer",
    "build_replica_optimizer",
    "optimizer_config",
    "parameter_table",
    "wrap_optimizer",
]


# ------------------------------------------------------------------------------------------
# How pseudogradients travel: the reducer that a config asks for.


def build_reducer(
    outer: NesterovOuter | AverageOuter,
    groups: Groups,
    device: torch.device,
    shards: Sequence[Shard],
) -> Reducer:
    """Return the reducer for pseudogradients of ``shards``; with overlap it works beside training.

    An all-reduce of device memory does so by itself; everything else has phases that somebody has
    to work on.
    """
    reducer = _foreground(outer, groups, device, shards)
    return BackgroundReducer(reducer, device) if outer.reduces_in_thread else reducer


def build_plain_reducer(
    outer: NesterovOuter | AverageOuter, groups: Groups, device: torch.device
) -> Reducer:
    """Return the fp32 mean without a code, for the flush; deterministic where the run is."""
    code = outer.compression
    return build_plain_reducer_for(
        groups.exchange,
        device,
        deterministic=not isinstance(code, NoCompression) or code.deterministic,
        through_host=outer.sends_from_host,
    )


def _foreground(
    outer: NesterovOuter | AverageOuter,
    groups: Groups,
    device: torch.device,
    shards: Sequence[Shard],
) -> Reducer:
    code = outer.compression
    if isinstance(code, NoCompression):
        return build_plain_reducer_for(
            groups.exchange,
            device,
            wire_dtype=code.wire_dtype,
            deterministic=code.deterministic,
            through_host=outer.sends_from_host,
        )
    encoding = CompressedAllGather if isinstance(code, TopKCompression) else CompressedAllReduce
    return encoding(
        groups.exchange,
        device,
        codec_lookup(code, {shard.name: shard.param.kind for shard in shards}),
        row_places(shards),
        code.error_decay if code.error_feedback else None,
        through_host=outer.sends_from_host,
    )


# ------------------------------------------------------------------------------------------
# Puts the outer step around one rank's masters, each part from its section of the config.


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
    tied = None if config.model.untie_embeddings_and_output_weights else view.names.embedding
    duplicates = ReplicatedBroadcast(groups, view.shards, view.masters, tied_name=tied)
    port = ReplicaPort(
        device=device,
        shards=view.shards,
        masters=view.masters,
        total=ReplicaSum(groups.replica),
        broadcast_replicated=duplicates,
        publish=view.publish,
    )
    synchronizer = Synchronizer(
        port,
        FragmentPlan.by_layer(
            view.infos.values(),
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
            max_norm_ratio=outer.guard.max_norm_ratio or float("inf"),
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


# ------------------------------------------------------------------------------------------


def wrap_optimizer(
    optimizer: Any,
    model: DistributedDataParallel,
    config: RunConfig,
    groups: Groups,
    *,
    names: ParameterNames = GPT_NAMES,
) -> ReplicaOptimizer:
    """Return a wrapper of ``optimizer`` whose ``step()`` also makes the outer steps that are due.

    The inner optimizer that Megatron created (apex's, Transformer Engine's or torch's Adam) is
    replaced by the one that ``config.inner`` describes, on the same shards.

    Args:
        optimizer: What ``get_megatron_optimizer`` returned, or a `DistributedOptimizer`.
        model: This rank's pipeline stage, wrapped with ``use_distributed_optimizer=True``.
        config: The run.
        groups: From `initialize_replicas`.
        names: Names of the model's parameters, for an architecture other than ``GPTModel``.

    Raises:
        RuntimeMismatch: The optimizer has no masters that this package knows, or a parameter has no
            rule (see `ParameterTable`).

    Collectives: object gathers over dp x cp and stage groups; every rank calls it at the same
    point.
    """
    distributed = find_distributed_optimizer(optimizer)
    _check_clipping(distributed, config)
    keep_statistics_inside(distributed, groups)
    view = MasterView(model, distributed, groups, names)
    inner = _bound_inner(view, config, groups)
    distributed.optimizer = inner
    derived = derive(config, groups.topology)
    synchronizer, checks = build_outer_step(view, config, derived, groups)
    return ReplicaOptimizer(optimizer, view, inner, synchronizer, checks, config, derived)


def _check_clipping(optimizer: DistributedOptimizer, config: RunConfig) -> None:
    """Refuse two truths about clipping.

    Raises:
        RuntimeMismatch: Megatron's ``clip_grad`` is not the configuration's.
    """
    theirs, ours = optimizer.config.clip_grad, config.training.clip_grad
    if theirs != ours:
        raise RuntimeMismatch(
            f"Megatron's OptimizerConfig clips at {theirs} and training.clip_grad says {ours}, so "
            "the run would not be the one that the configuration describes. Give both one value."
        )


def build_replica_optimizer(
    model: DistributedDataParallel, config: RunConfig, groups: Groups
) -> ReplicaOptimizer:
    """Build Megatron's distributed optimizer for ``model`` and wrap it."""
    placeholder = torch.optim.AdamW(
        [parameter for parameter in model.module.parameters() if parameter.requires_grad],
        lr=config.inner.lr,
    )
    distributed = build_distributed_optimizer(model, groups, placeholder, optimizer_config(config))
    return wrap_optimizer(distributed, model, config, groups)


def optimizer_config(config: RunConfig) -> OptimizerConfig:
    """Translate the configuration for Megatron's optimizer. Pure."""
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


def parameter_table(view: MasterView, config: RunConfig, groups: Groups) -> ParameterTable:
    """Return the table of this stage's parameters: route, matrices, owners, multipliers."""
    model, vector = config.model, config.inner.vector
    settings, _ = _muon_settings(config)
    topology = groups.topology
    return build_parameter_table(
        list(view.infos.values()),
        LayerShape(
            num_attention_heads=model.num_attention_heads,
            num_query_groups=model.query_groups,
            kv_channels=model.kv_channels,
            ffn_hidden_size=model.ffn_hidden_size,
        ),
        kind=config.inner.kind,
        tensor_size=topology.tensor,
        group_size=groups.stage.size(),
        num_ns_steps=settings.num_ns_steps if settings else 0,
        split_heads=isinstance(config.inner, MuonInner) and config.inner.muon.split_heads,
        choose_impl=partial(settings.implementation, device=training_device())
        if settings
        else always_plain,
        multipliers={
            name: (vector.lr_mult, vector.weight_decay_mult)
            for name, info in view.infos.items()
            if is_vector(info)
        },
    )


def _bound_inner(view: MasterView, config: RunConfig, groups: Groups) -> MuonAdamW:
    """Create the inner optimizer over this rank's shards, a group for each pair of multipliers."""
    table = parameter_table(view, config, groups)
    settings, wire = _muon_settings(config)
    adam = config.inner.adam
    multipliers = {row.name: (row.lr_mult, row.wd_mult) for row in table.rows}
    kinds = list(dict.fromkeys(multipliers.values()))
    inner = MuonAdamW(
        [{"params": [], "lr_mult": lr_mult, "wd_mult": wd_mult} for lr_mult, wd_mult in kinds],
        lr=config.inner.lr,
        betas=(adam.beta1, adam.beta2),
        eps=adam.eps,
        muon=settings,
    )
    pairs = [(view.raw_masters[shard.name], shard) for shard in view.shards]
    for tensor, shard in pairs:
        # Not by add_param_group: fp32 masters are views of parameters, which torch would refuse.
        inner.param_groups[kinds.index(multipliers[shard.name])]["params"].append(tensor)
    buckets = config.inner.muon.exchange_chunks if isinstance(config.inner, MuonInner) else 1
    exchange = _exchange(view, table, groups, wire, buckets) if table.matrices else None
    inner.bind(pairs, table, exchange)
    return inner


def _muon_settings(config: RunConfig) -> tuple[MuonSettings | None, torch.dtype]:
    """Return Muon's settings and the dtype on its wire, ``auto`` resolved by the device."""
    if not isinstance(config.inner, MuonInner):
        return None, torch.float32
    muon = config.inner.muon
    on_accelerator = torch.cuda.is_available()
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    settings = MuonSettings(
        momentum=muon.momentum,
        accumulation=muon.accumulation,
        nesterov=muon.nesterov,
        num_ns_steps=muon.num_ns_steps,
        coefficient_type=muon.coefficient_type,
        scale_mode=muon.scale_mode,
        ns_dtype=dtypes[muon.compute_dtype(accelerator=on_accelerator)],
        eps=muon.eps,
        impl=muon.ns_impl,
    )
    return settings, dtypes[muon.wire_dtype(accelerator=on_accelerator)]


def _exchange(
    view: MasterView,
    table: ParameterTable,
    groups: Groups,
    wire_dtype: torch.dtype,
    buckets: int,
) -> ShardExchange:
    """Build the shards <-> owners exchange of this pipeline stage."""
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
        wire_dtype=wire_dtype,
        device=training_device(),
        buckets=buckets,
    )
