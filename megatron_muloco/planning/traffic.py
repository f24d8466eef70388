"""Bytes that one rank sends, inside its replica every step and to other replicas every round.

Collectives are counted as their bandwidth-optimal algorithms send them: a reduce-scatter or an
all-gather of n bytes over k ranks sends n*(k-1)/k per rank, an all-reduce twice that, an all-to-all
n*(k-1)/k of what a rank holds. The outer exchange is counted by `outer_traffic`.
"""

from dataclasses import dataclass

from megatron_muloco.config.derived import derive
from megatron_muloco.config.inner import MuonInner
from megatron_muloco.config.schema import RunConfig
from megatron_muloco.planning.outer_traffic import round_bytes, uncoded_bytes
from megatron_muloco.planning.rank_shards import stage_shards
from megatron_muloco.planning.slices import BYTES, Slice, stage_slices
from megatron_muloco.topology import Topology

__all__ = ["TrafficPlan", "planned_on_accelerator", "traffic_plan"]


@dataclass(frozen=True, slots=True)
class TrafficPlan:
    """Bytes sent per rank; the busiest rank of each kind.

    Attributes:
        gradient_reduce: Per inner step over the dp (x cp) group.
        parameter_gather: Per inner step over the dp (x cp) group.
        muon_exchange: Per inner step over the stage group: momentum to owners, updates back.
        tensor_parallel: Per inner step over the tp group: activations and their gradients.
        pipeline: Per inner step to the neighbouring stages.
        outer_per_rank: Per round that compares replicas, over the outer group.
        outer_per_replica: Per round, all ranks of one replica together; the busiest replica.
        outer_uncoded: What fp32 all-reduces of the values alone would send instead of the latter.
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
    """Return which device a plan assumes, as it is often made on another machine than the run's.

    Runs in bf16 are taken for runs on accelerators, others for runs on CPUs. Only Muon's ``auto``
    dtypes depend on it.
    """
    return config.training.precision == "bf16"


def _activation_bytes(config: RunConfig) -> int:
    """Return the bytes of one microbatch's residual stream."""
    training, model = config.training, config.model
    tokens = training.micro_batch_size * model.seq_length
    return tokens * model.hidden_size * BYTES[training.precision]


def _tensor_parallel_bytes(config: RunConfig, topology: Topology) -> int:
    """Return the bytes of activations over the tp group in one step.

    Each layer has two all-reduces forward and two backward (with sequence parallelism an all-gather
    and a reduce-scatter each, the same bytes; that backward gathers inputs again is not counted).
    The embedding adds one on the first stage, the head one on the last.
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
