"""Bytes that one rank sends: inside its replica every step, and to other replicas every round.

Inside a replica, collectives are counted as their bandwidth-optimal algorithms send them: a
reduce-scatter or an all-gather of n bytes over k ranks sends n*(k-1)/k per rank, an all-reduce
twice that, and an all-to-all n*(k-1)/k of what a rank holds. Between replicas, bytes are counted
exactly as the reducers send them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_muloco.comm.chunking import (
    chunk_pieces,
    encoded_wire_bytes,
    payload_sizes,
    row_places,
    uncoded_wire_bytes,
)
from megatron_muloco.compress.format import payload_size, spec_of
from megatron_muloco.config.derived import derive, sketch_width
from megatron_muloco.config.inner import MuonInner
from megatron_muloco.config.outer import (
    AverageOuter,
    CompressionConfig,
    LossyCompression,
    NesterovOuter,
    NoCompression,
    NoOuter,
    TopKCompression,
)
from megatron_muloco.config.schema import RunConfig
from megatron_muloco.outer.schedule import LineCalendar, SyncSchedule
from megatron_muloco.params import Shard
from megatron_muloco.planning.layout import (
    BYTES,
    Slice,
    by_fragment,
    rank_shards,
    stage_shards,
    stage_slices,
)
from megatron_muloco.topology import Coords, Topology

__all__ = [
    "TrafficPlan",
    "chunk_payloads",
    "mean_wire_bytes",
    "outer_bytes",
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


def outer_bytes(
    config: RunConfig, topology: Topology, coords: Coords, *, sketch: bool = True
) -> int:
    """Return the bytes that one rank sends in a round.

    Args:
        config: A checked config.
        topology: Topology of the world.
        coords: The rank's place in the topology.
        sketch: Whether the round compares replicas, and so sends sketches.
    """
    shards = rank_shards(config, topology, coords)
    return round_bytes(config, topology, shards, sketch=sketch)[coords.replica]


def round_bytes(
    config: RunConfig, topology: Topology, shards: Sequence[Shard], *, sketch: bool = True
) -> list[int]:
    """Return the bytes that the ranks with these shards send in a round, by replica."""
    outer, sent = config.outer, [0] * topology.num_replicas
    if isinstance(outer, NoOuter):
        return sent
    numbers = 1 + _lines(config, outer)
    width = sketch_width(config, topology) if sketch else 0
    for fragment in by_fragment(config, shards):
        metadata = numbers + (width if fragment else 0)
        launch = _launch_bytes(outer.compression, fragment, topology.num_replicas, metadata)
        sent = [total + more for total, more in zip(sent, launch, strict=True)]
    return sent


def uncoded_bytes(config: RunConfig, topology: Topology, shards: Sequence[Shard]) -> int:
    """Return the bytes that fp32 all-reduces of a round's values would send, without metadata."""
    return sum(
        uncoded_wire_bytes(_numel(fragment), topology.num_replicas)
        for fragment in by_fragment(config, shards)
    )


def _launch_bytes(
    code: CompressionConfig, shards: Sequence[Shard], num_replicas: int, metadata: int
) -> list[int]:
    """Return the bytes that one launch of a fragment's shards sends, by replica."""
    if isinstance(code, NoCompression):
        mean = mean_wire_bytes(
            _numel(shards),
            num_replicas,
            code.wire_dtype,
            metadata,
            deterministic=code.deterministic,
        )
        return [mean] * num_replicas
    sizes = chunk_payloads(code, shards, num_replicas)
    if isinstance(code, TopKCompression):
        return [(num_replicas - 1) * (4 * (1 + metadata) + sum(sizes))] * num_replicas
    return [encoded_wire_bytes(sizes, index, metadata) for index in range(num_replicas)]


def chunk_payloads(code: LossyCompression, shards: Sequence[Shard], num_replicas: int) -> list[int]:
    """Return the encoded bytes of a fragment's chunks; top-k has one chunk."""
    chunks = chunk_pieces(
        [(shard.name, shard.numel) for shard in shards],
        1 if isinstance(code, TopKCompression) else num_replicas,
        row_places(shards),
    )
    kinds = {shard.name: shard.param.kind for shard in shards}
    return payload_sizes(chunks, lambda name: payload_size(spec_of(code, kinds[name])))


def mean_wire_bytes(
    elements: int,
    num_replicas: int,
    wire_dtype: str,
    metadata: int = 0,
    *,
    deterministic: bool = False,
) -> int:
    """Return the bytes that one rank sends for an uncompressed mean over the outer group.

    Args:
        elements: Number of values in the rank's shards.
        num_replicas: K, the size of the outer group.
        wire_dtype: ``fp32`` is an all-reduce of one buffer; ``bf16`` is an all-to-all of chunks and
            an all-gather of their means.
        metadata: Number of fp32 metadata values of each replica.
        deterministic: Whether ``fp32`` is sent in chunks too, like ``bf16``.
    """
    if num_replicas == 1:
        return 0
    row = 1 + metadata
    if wire_dtype == "fp32" and not deterministic:
        return uncoded_wire_bytes(elements + num_replicas * row, num_replicas)
    chunk = -(-elements // num_replicas)
    chunk += chunk % 2  # the reducer rounds chunks up to even, so that fp32 rows stay aligned
    return (num_replicas - 1) * (row * BYTES["fp32"] + 2 * chunk * BYTES[wire_dtype])


def _numel(shards: Sequence[Shard]) -> int:
    return sum(shard.numel for shard in shards)


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
        pipeline: Bytes per inner step to the neighbouring stages.
        outer_per_rank: Bytes per round that compares replicas, over the outer group.
        outer_per_replica: Bytes per round of all ranks of the replica that sends most.
        outer_uncoded: Bytes that fp32 all-reduces of the values would send per replica and round.
    """

    gradient_reduce: int
    parameter_gather: int
    muon_exchange: int
    tensor_parallel: int
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
            + self.pipeline
        )


def traffic_plan(config: RunConfig, topology: Topology) -> TrafficPlan:
    """Return the bytes sent per rank on the stage that sends most inside the replica."""
    slices = stage_slices(config.model, topology)
    positions = [
        shards
        for part in slices
        for tp_rank in range(topology.tensor)
        for shards in stage_shards(config, topology, stage=part.stage, tp_rank=tp_rank)
    ]
    outer = [round_bytes(config, topology, shards) for shards in positions]
    stages = [_stage_traffic(config, topology, part) for part in slices]
    gradients, gathers, exchange = (max(values) for values in zip(*stages, strict=True))
    return TrafficPlan(
        gradient_reduce=gradients,
        parameter_gather=gathers,
        muon_exchange=exchange,
        tensor_parallel=_tensor_parallel_bytes(config, topology),
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

    Runs in bf16 are assumed to use accelerators, others CPUs. Only Muon's ``auto`` settings depend
    on it.
    """
    return config.training.precision == "bf16"


def _activation_bytes(config: RunConfig) -> int:
    """Return the bytes of one microbatch's residual stream."""
    training, model = config.training, config.model
    tokens = training.micro_batch_size * model.seq_length
    return tokens * model.hidden_size * BYTES[training.precision]


def _tensor_parallel_bytes(config: RunConfig, topology: Topology) -> int:
    """Return the bytes of activations over the tp group in one step.

    Each layer has two all-reduces forward and two backward. With sequence parallelism each of them
    is an all-gather and a reduce-scatter, which send the same bytes; the second gather of inputs in
    backward is not counted. The embedding adds one on the first stage, the head one on the last.
    """
    tp, layers = topology.tensor, config.model.num_layers // topology.pipeline
    per_reduce = 2 * _activation_bytes(config) * (tp - 1) // tp
    return derive(config, topology).num_microbatches * (4 * layers + 1) * per_reduce


def _pipeline_bytes(config: RunConfig, topology: Topology) -> int:
    """Return the bytes that a middle stage sends in one step: activations on, gradients back."""
    if topology.pipeline == 1:
        return 0
    neighbours = 2 if topology.pipeline > 2 else 1
    size = _activation_bytes(config)
    if config.parallel.sequence_parallel:
        size //= topology.tensor
    return derive(config, topology).num_microbatches * neighbours * size
