"""Bytes that one rank sends, inside its replica every step and to other replicas every round.

Collectives are counted as their bandwidth-optimal algorithms send them: a reduce-scatter or an
all-gather of n bytes over k ranks sends n*(k-1)/k per rank, an all-reduce twice that, an all-to-all
n*(k-1)/k of what a rank holds. The outer exchange is counted exactly as its reducer sends it.
"""

from dataclasses import dataclass

from megatron_muloco.config.derived import derive
from megatron_muloco.config.inner import MuonInner
from megatron_muloco.config.outer import NoCompression, NoOuter
from megatron_muloco.config.schema import RunConfig
from megatron_muloco.planning.memory import BYTES
from megatron_muloco.planning.slices import Slice, stage_slices
from megatron_muloco.topology import Topology

__all__ = ["TrafficPlan", "mean_wire_bytes", "traffic_plan"]


@dataclass(frozen=True, slots=True)
class TrafficPlan:
    """Bytes sent per rank; the busiest rank of each kind.

    Attributes:
        gradient_reduce: Per inner step over the dp (x cp) group.
        parameter_gather: Per inner step over the dp (x cp) group.
        muon_exchange: Per inner step over the stage group: momentum to owners, updates back.
        tensor_parallel: Per inner step over the tp group: activations and their gradients.
        pipeline: Per inner step to the neighbouring stages.
        outer_per_rank: Per round over the outer group.
        outer_per_replica: Per round, all ranks of one replica together.
    """

    gradient_reduce: int
    parameter_gather: int
    muon_exchange: int
    tensor_parallel: int
    pipeline: int
    outer_per_rank: int
    outer_per_replica: int

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


def mean_wire_bytes(elements: int, num_replicas: int, wire_dtype: str, riders: int = 0) -> int:
    """Return the bytes that one rank sends for an uncompressed mean over the outer group.

    Args:
        elements: Values of the rank's shards.
        num_replicas: K, the size of the outer group.
        wire_dtype: ``fp32`` is an all-reduce of one buffer; ``bf16`` is an all-to-all of chunks and
            an all-gather of their means.
        riders: fp32 numbers of each replica that travel along, such as its loss.
    """
    if num_replicas == 1:
        return 0
    row = 1 + riders
    if wire_dtype == "fp32":
        chunk = -(-(elements + num_replicas * row) // num_replicas)
        return 2 * (num_replicas - 1) * chunk * BYTES["fp32"]
    chunk = -(-elements // num_replicas)
    chunk += chunk % 2  # the reducer keeps chunks even, so that fp32 rows stay aligned
    return (num_replicas - 1) * (row * BYTES["fp32"] + 2 * chunk * BYTES[wire_dtype])


def traffic_plan(config: RunConfig, topology: Topology) -> TrafficPlan:
    """Return the bytes sent per rank on the stage that sends most inside the replica."""
    slices = stage_slices(config.model, topology)
    outer = [
        [
            _outer_bytes(config, topology, -(-part.synchronised(tp_rank) // topology.sharding))
            for tp_rank in range(topology.tensor)
        ]
        for part in slices
    ]
    stages = [_stage_traffic(config, topology, part) for part in slices]
    gradients, gathers, exchange = (max(values) for values in zip(*stages, strict=True))
    return TrafficPlan(
        gradient_reduce=gradients,
        parameter_gather=gathers,
        muon_exchange=exchange,
        tensor_parallel=_tensor_parallel_bytes(config, topology),
        pipeline=_pipeline_bytes(config, topology),
        outer_per_rank=max(max(stage) for stage in outer),
        outer_per_replica=topology.sharding * sum(sum(stage) for stage in outer),
    )


def _outer_bytes(config: RunConfig, topology: Topology, elements: int) -> int:
    """Return the bytes that a rank with this many synchronised elements sends in a round."""
    if isinstance(config.outer, NoOuter):
        return 0
    code = config.outer.compression
    if not isinstance(code, NoCompression):
        raise NotImplementedError(f"bytes of outer.compression.kind {code.kind} are not known")
    return mean_wire_bytes(elements, topology.num_replicas, code.wire_dtype)


def _stage_traffic(config: RunConfig, topology: Topology, part: Slice) -> tuple[int, int, int]:
    """Return gradient, gather and exchange bytes of one rank of a stage."""
    training, shards = config.training, topology.sharding
    gradients = part.total * BYTES[training.accumulate_dtype] * (shards - 1) // shards
    gathers = part.total * BYTES[training.precision] * (shards - 1) // shards
    if not isinstance(config.inner, MuonInner):
        return gradients, gathers, 0
    held = part.matrices // shards
    size = BYTES[exchange_dtype(config.inner, training.precision)]
    exchange = 2 * held * size * (topology.stage_size - 1) // topology.stage_size
    return gradients, gathers, exchange


def exchange_dtype(inner: MuonInner, precision: str) -> str:
    """Return the dtype of Muon's exchange, ``auto`` resolved as on the device precision is for."""
    muon = inner.muon
    chosen = muon.ns_dtype if muon.exchange_dtype == "auto" else muon.exchange_dtype
    return precision if chosen == "auto" else chosen


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
