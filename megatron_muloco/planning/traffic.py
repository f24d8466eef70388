"""Bytes that one rank sends: inside its replica every step, and to other replicas every round.

Inside a replica, collectives are counted as their bandwidth-optimal algorithms send them: a
reduce-scatter or an all-gather of n bytes over k ranks sends n*(k-1)/k per rank, an all-reduce
twice that, and an all-to-all n*(k-1)/k of what a rank holds. Between replicas, bytes are counted
exactly as the reducers send them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_muloco.comm.chunking import ring_bytes
from megatron_muloco.comm.costs import reducer_cost
from megatron_muloco.config.derived import derive, sketch_width, stage_layers
from megatron_muloco.config.inner import MuonInner
from megatron_muloco.config.outer import AverageOuter, NesterovOuter, NoOuter
from megatron_muloco.config.schema import RunConfig
from megatron_muloco.outer.schedule import LineCalendar, SyncSchedule
from megatron_muloco.params import Shard
from megatron_muloco.planning.layout import (
    BYTES,
    Slice,
    by_fragment,
    stage_shards,
    stage_slices,
)
from megatron_muloco.topology import Topology

__all__ = [
    "TrafficPlan",
    "launch_bytes",
    "planned_on_accelerator",
    "round_bytes",
    "traffic_plan",
    "uncoded_bytes",
]


# ------------------------------------------------------------------------------------------
# Bytes that one rank sends to other replicas.
#
# A launch sends the rank's shards of a fragment, and one row per replica::
#
#     [ weight | norm | line values | sketch ]       fp32
#
# Ranks at the same position of different replicas hold the same shards. With a compressed
# all-reduce they own different chunks, and so send different numbers of bytes.


def round_bytes(
    config: RunConfig, topology: Topology, shards: Sequence[Shard], *, sketch: bool = True
) -> list[int]:
    """Return the bytes that the ranks with these shards send in a round, by replica.

    Args:
        config: A checked config.
        topology: Topology of the world.
        shards: Shards of ranks at one position of their replicas.
        sketch: Whether the round compares replicas, and so sends sketches.
    """
    sent = [0] * topology.num_replicas
    for fragment in _by_launch(config, topology, shards, sketch=sketch):
        sent = [total + more for total, more in zip(sent, fragment, strict=True)]
    return sent


def _by_launch(
    config: RunConfig, topology: Topology, shards: Sequence[Shard], *, sketch: bool = True
) -> list[tuple[int, ...]]:
    """Return what `round_bytes` adds up: for each fragment, the bytes by replica."""
    outer = config.outer
    if isinstance(outer, NoOuter):
        return []
    numbers = 1 + _lines(config, outer)
    width = sketch_width(config, topology) if sketch else 0
    return [
        reducer_cost(
            outer.compression,
            fragment,
            topology.num_replicas,
            metadata_count=numbers + (width if fragment else 0),
        ).sent
        for fragment in by_fragment(config, shards)
    ]


def launch_bytes(config: RunConfig, topology: Topology) -> tuple[int, ...]:
    """Return the bytes of each fragment that all ranks of a replica send.

    Of the replica that sends most in a round; none without outer steps.
    """
    launches = zip(
        *(_by_launch(config, topology, shards) for shards in _positions(config, topology)),
        strict=True,
    )
    by_fragment_and_replica = [[sum(b) for b in zip(*parts, strict=True)] for parts in launches]
    return max(zip(*by_fragment_and_replica, strict=True), key=sum, default=())


def _positions(config: RunConfig, topology: Topology) -> list[tuple[Shard, ...]]:
    """Return the shards of every rank of a replica."""
    return [
        shards
        for stage in range(topology.pipeline)
        for tp_rank in range(topology.tensor)
        for shards in stage_shards(config, topology, stage=stage, tp_rank=tp_rank)
    ]


def uncoded_bytes(config: RunConfig, topology: Topology, shards: Sequence[Shard]) -> int:
    """Return the bytes that fp32 all-reduces of a round's values would send, without metadata."""
    return sum(
        ring_bytes(sum(shard.numel for shard in fragment), topology.num_replicas)
        for fragment in by_fragment(config, shards)
    )


def _lines(config: RunConfig, outer: NesterovOuter | AverageOuter) -> int:
    """Return the number of line values that are sent with a launch."""
    schedule = SyncSchedule.from_config(outer, derive(config).train_iters)
    return LineCalendar(config.monitor.log_interval, schedule).value_count()


# ------------------------------------------------------------------------------------------
# All traffic of a rank.


@dataclass(frozen=True, slots=True)
class TrafficPlan:
    """Bytes sent by the rank that sends most, separately for each kind.

    Attributes:
        gradient_reduce: Bytes per inner step over the dp (x cp) group.
        parameter_gather: Bytes per inner step over the dp (x cp) group.
        muon_exchange: Bytes per inner step over the stage group: momentum to owners, updates back.
        tensor_parallel: Bytes per inner step over the tp group: activations and their gradients.
        context_parallel: Bytes per inner step over the cp group: keys, values, their gradients.
        pipeline: Bytes per inner step to the neighbouring stages.
        outer_per_rank: Bytes per round that compares replicas, over the outer group.
        outer_per_replica: Bytes per round of all ranks of the replica that sends most.
        outer_uncoded: Bytes that fp32 all-reduces of the values would send per replica and round.
    """

    gradient_reduce: int
    parameter_gather: int
    muon_exchange: int
    tensor_parallel: int
    context_parallel: int
    pipeline: int
    outer_per_rank: int
    outer_per_replica: int
    outer_uncoded: int

    @property
    def inner_step(self) -> int:
        """Bytes per inner step inside the replica."""
        return (
            self.gradient_reduce
            + self.parameter_gather
            + self.muon_exchange
            + self.tensor_parallel
            + self.context_parallel
            + self.pipeline
        )


def traffic_plan(config: RunConfig, topology: Topology) -> TrafficPlan:
    """Return the bytes sent per rank on the stage that sends most inside the replica."""
    slices, positions = stage_slices(config, topology), _positions(config, topology)
    outer = [round_bytes(config, topology, shards) for shards in positions]
    stages = [_stage_traffic(config, topology, part) for part in slices]
    gradients, gathers, exchange = (max(values) for values in zip(*stages, strict=True))
    return TrafficPlan(
        gradient_reduce=gradients,
        parameter_gather=gathers,
        muon_exchange=exchange,
        tensor_parallel=_tensor_parallel_bytes(config, topology),
        context_parallel=_context_parallel_bytes(config, topology),
        pipeline=_pipeline_bytes(config, topology),
        outer_per_rank=max(map(max, outer)),
        outer_per_replica=max(map(sum, zip(*outer, strict=True))),
        outer_uncoded=sum(uncoded_bytes(config, topology, shards) for shards in positions),
    )


def _stage_traffic(config: RunConfig, topology: Topology, part: Slice) -> tuple[int, int, int]:
    """Return gradient, gather and exchange bytes of one rank of a stage."""
    training, shards = config.training, topology.sharding
    gradients = part.total * BYTES[training.accumulate_dtype] * (shards - 1) // shards
    gathers = part.total * BYTES[training.precision] * (shards - 1) // shards
    if not isinstance(config.inner, MuonInner):
        return gradients, gathers, 0
    held = part.matrices // shards
    wire = config.inner.muon.wire_dtype(accelerator=planned_on_accelerator(config))
    exchange = 2 * held * BYTES[wire] * (topology.stage_size - 1) // topology.stage_size
    return gradients, gathers, exchange


def planned_on_accelerator(config: RunConfig) -> bool:
    """Return whether a plan assumes accelerators; it is often made on another machine than the run.

    Runs in bf16 are assumed to use accelerators, others CPUs. Muon's ``auto`` settings depend on
    it, and whether a communication thread is used.
    """
    return config.training.precision == "bf16"


def _activation_bytes(config: RunConfig) -> int:
    """Return the bytes of one microbatch's residual stream on a context-parallel rank."""
    training, model = config.training, config.model
    tokens = training.micro_batch_size * model.seq_length // config.parallel.context_parallel_size
    return tokens * model.hidden_size * BYTES[training.precision]


def _tensor_parallel_bytes(config: RunConfig, topology: Topology) -> int:
    """Return the bytes of activations over the tp group in one step.

    Each layer has two all-reduces forward and two backward. With sequence parallelism each of them
    is an all-gather and a reduce-scatter, which send the same bytes; the second gather of inputs in
    backward is not counted. The embedding adds one on the first stage, the head one on the last.
    """
    tp, layers = topology.tensor, max(map(len, stage_layers(config, topology)))
    per_reduce = 2 * _activation_bytes(config) * (tp - 1) // tp
    return derive(config, topology).num_microbatches * (4 * layers + 1) * per_reduce


def _context_parallel_bytes(config: RunConfig, topology: Topology) -> int:
    """Return the bytes of keys and values over the cp group in one step.

    Each layer gathers them forward and scatters the sums of their gradients backward; recomputation
    gathers them once more and is not counted.
    """
    training, model, cp = config.training, config.model, topology.context
    layers = max(map(len, stage_layers(config, topology)))
    width = 2 * model.query_groups * model.kv_channels // topology.tensor
    tokens = training.micro_batch_size * model.seq_length
    per_layer = 2 * tokens * width * BYTES[training.precision] * (cp - 1) // cp
    return derive(config, topology).num_microbatches * layers * per_layer


def _pipeline_bytes(config: RunConfig, topology: Topology) -> int:
    """Return the bytes that a middle stage sends in one step: activations on, gradients back."""
    if topology.pipeline == 1:
        return 0
    neighbours = 2 if topology.pipeline > 2 else 1
    size = _activation_bytes(config)
    if config.parallel.sequence_parallel:
        size //= topology.tensor
    return derive(config, topology).num_microbatches * neighbours * size
