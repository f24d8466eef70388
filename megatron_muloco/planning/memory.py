"""Bytes that one rank holds: weights, gradients, optimizer state, and buffers of outer steps.

Megatron's distributed optimizer keeps the weights and gradients of a rank's slice whole, and
divides masters and moments over data-parallel (x context-parallel) ranks. The shards of each rank
are known (`planning.layout`), and with them their number of moments and their fragments. Anchor and
outer momentum are divided like the masters, and so are the buffers of outer steps. The buffers of
the matrix exchange depend on the owners of the matrices.

Not counted: activations, other temporary buffers, the allocator's slack, metadata and sketches (a
few hundred kilobytes), and Megatron's padding (a few kilobytes per bucket).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_muloco.comm.chunking import chunk_length, chunk_pieces, row_places
from megatron_muloco.config.derived import derive
from megatron_muloco.config.inner import MuonInner
from megatron_muloco.config.outer import (
    CompressionConfig,
    LossyCompression,
    NoCompression,
    NoOuter,
    TopKCompression,
)
from megatron_muloco.config.schema import RunConfig
from megatron_muloco.optim.matrices import is_vector
from megatron_muloco.optim.parameter_table import assign
from megatron_muloco.optim.routing import divide, largest_batch
from megatron_muloco.outer.schedule import Average, SyncSchedule
from megatron_muloco.params import Shard
from megatron_muloco.planning.layout import (
    BYTES,
    Slice,
    by_fragment,
    stage_matrices,
    stage_shards,
    stage_slices,
)
from megatron_muloco.planning.traffic import chunk_payloads, planned_on_accelerator
from megatron_muloco.topology import Topology

__all__ = [
    "MemoryPlan",
    "OuterMemory",
    "ReducerMemory",
    "exchange_bytes",
    "memory_plan",
    "outer_memory",
    "reducer_memory",
    "residual_bytes",
]


# ------------------------------------------------------------------------------------------
# Memory of the reduction of one fragment.
#
# In bytes for each of the rank's n values, with w bytes per sent value, p bytes of payload per
# value, K replicas, and u values in the largest unit that is encoded at once::
#
#                         kept between rounds    in launch     in wait
#     fp32 all-reduce     4                      0             0, the result is in the buffer
#     in chunks           3w                     0             bf16 8; fp32 4 + about 2
#     linear, statistical,
#     e3m0                2p                     13 u / n      4 + p (1 + 1/K), or p / K + 17 u / n
#     topk                (1 + K) p              10 u / n      4 + 6 u / n
#
# Transport through the host keeps a copy of sent and received buffers there.


# Upper bound of what encoding a large unit allocates, in bytes per value: with error feedback two
# fp32 copies, codes, and temporaries of packing. Measured on a CPU: 9 to 12.02. Blocks of one or
# two megabytes are not counted.
_ENCODING = 13
# Top-k: measured 9, and 20 for each kept value (its int64 place alone takes 8).
_SELECTING, _KEEPING = 10, 24


@dataclass(frozen=True, slots=True)
class ReducerMemory:
    """Bytes for the reduction of one fragment.

    Attributes:
        buffers: Bytes of sent and received buffers, kept between rounds.
        launching: Additional bytes in `launch`, without the pseudogradients.
        waiting: Additional bytes in `wait`, with the result.
        staged: Bytes of copies in host memory, where tensors are sent through the host.
    """

    buffers: int
    launching: int
    waiting: int
    staged: int


def reducer_memory(
    code: CompressionConfig, shards: Sequence[Shard], num_replicas: int
) -> ReducerMemory:
    """Return the bytes for a fragment of these shards."""
    elements = sum(shard.numel for shard in shards)
    if not isinstance(code, NoCompression):
        return _coded(code, shards, elements, num_replicas)
    fp32, wire = BYTES["fp32"] * elements, BYTES[code.wire_dtype] * elements
    if code.is_all_reduce:
        return ReducerMemory(buffers=fp32, launching=0, waiting=0, staged=fp32)
    pairs = num_replicas // 2  # first sums of neighbours, besides all chunks in fp32
    summing = fp32 * (num_replicas + pairs) // num_replicas
    waiting = summing if code.wire_dtype == "fp32" else 2 * fp32  # bf16: before and after weighing
    return ReducerMemory(buffers=3 * wire, launching=0, waiting=waiting, staged=2 * wire)


def _coded(
    code: LossyCompression, shards: Sequence[Shard], elements: int, num_replicas: int
) -> ReducerMemory:
    sizes = chunk_payloads(code, shards, num_replicas)
    fp32, payload = BYTES["fp32"] * elements, sum(sizes)
    unit = _largest_unit(code, shards, num_replicas)
    if isinstance(code, TopKCompression):
        buffers = (1 + num_replicas) * payload
        kept = round(_KEEPING * code.density * unit)
        return ReducerMemory(
            buffers=buffers,
            launching=_SELECTING * unit + kept,
            waiting=fp32 + 6 * unit + kept,  # the mean, and one replica's values being decoded
            staged=buffers,
        )
    own = max(sizes)
    buffers = payload + num_replicas * own
    # Either the owner encodes its mean, or all payloads are decoded into the mean.
    waiting = own + max((4 + _ENCODING) * unit, payload + fp32 + 4 * unit)
    return ReducerMemory(buffers, _ENCODING * unit, waiting, staged=buffers)


def _largest_unit(code: LossyCompression, shards: Sequence[Shard], num_replicas: int) -> int:
    """Return the values of the largest unit that is encoded at once."""
    chunks = chunk_pieces(
        [(shard.name, shard.numel) for shard in shards],
        1 if isinstance(code, TopKCompression) else num_replicas,
        row_places(shards),
    )
    return max((piece.unit.numel for pieces in chunks for piece in pieces), default=0)


def residual_bytes(
    code: CompressionConfig, fragments: Sequence[Sequence[Shard]], num_replicas: int
) -> int:
    """Return the bytes of the residuals of error feedback, fp32.

    e of all the rank's values, and f of the chunks that it owns; top-k has no f, because its mean
    is not encoded.
    """
    if isinstance(code, NoCompression) or not code.error_feedback:
        return 0
    kept = 0
    for shards in fragments:
        sizes = [(shard.name, shard.numel) for shard in shards]
        elements = sum(size for _, size in sizes)
        kept += elements
        if not isinstance(code, TopKCompression):
            kept += min(elements, chunk_length(sizes, num_replicas))
    return BYTES["fp32"] * kept


# ------------------------------------------------------------------------------------------
# Memory of outer steps, besides anchor and momentum.
#
# For each fragment of a rank, in bytes per value::
#
#     kept between rounds, per fragment in flight   the reducer's buffers
#     copies of the local values at launch          4 per fragment in flight, none without overlap
#     error feedback                                4, and 4/K where the mean is encoded again
#     while a fragment is launched                  4 (the pseudogradient), and what encoding takes
#     while it is averaged after the last round     4, and another flat fp32 buffer, 4
#
# A communication thread reduces one fragment after the other. The reducer's buffers then exist
# once, and each fragment in flight holds 4 until it is applied: its pseudogradient, later its mean.


@dataclass(frozen=True, slots=True)
class OuterMemory:
    """Bytes of one rank.

    Attributes:
        in_flight: Number of fragments that are in flight at once, at most.
        buffers: Sent and received buffers, kept between rounds.
        queued: Pseudogradients and means held by the communication thread.
        at_launch: Copies of the local values at launch, for all fragments in flight.
        residuals: Residuals of error feedback.
        temporary: Additional bytes at the peak of an outer step.
        staged: Copies of sent and received buffers in host memory.
    """

    in_flight: int
    buffers: int
    queued: int
    at_launch: int
    residuals: int
    temporary: int
    staged: int

    @property
    def device(self) -> int:
        """Bytes in device memory."""
        return self.buffers + self.queued + self.at_launch + self.residuals + self.temporary


def outer_memory(config: RunConfig, topology: Topology, shards: Sequence[Shard]) -> OuterMemory:
    """Return the memory of outer steps on a rank with these shards.

    It assumes that the largest fragments are in flight together.
    """
    outer, replicas = config.outer, topology.num_replicas
    if isinstance(outer, NoOuter):
        return OuterMemory(0, 0, 0, 0, 0, 0, 0)
    fragments = by_fragment(config, shards)
    code = outer.compression
    schedule = SyncSchedule.from_config(outer, derive(config).train_iters)
    reducers = [reducer_memory(code, fragment, replicas) for fragment in fragments]
    values = [BYTES["fp32"] * sum(shard.numel for shard in part) for part in fragments]
    number, in_thread = _in_flight(schedule), outer.reduces_in_thread
    largest, at_once = max(values), 1 if in_thread else number
    at_launch = _largest(values, number) if outer.overlap_steps else 0
    queued = _largest(values, number) if in_thread else 0
    flushing = 0
    if any(isinstance(event, Average) for event in schedule.flush_events()):
        flushing = 2 * largest  # nothing else is in flight then
    launching = max(reducer.launching for reducer in reducers) + (0 if in_thread else largest)
    waiting = max(reducer.waiting for reducer in reducers)
    if in_thread:
        waiting = max(waiting, largest)  # the thread copies the mean out of the reducer's buffers
    return OuterMemory(
        in_flight=number,
        # Pooled buffers are shared by all fragments, and each grows to the largest.
        buffers=at_once * max(reducer.buffers for reducer in reducers),
        queued=queued,
        at_launch=at_launch,
        residuals=residual_bytes(code, fragments, replicas),
        temporary=max(launching, waiting, flushing - at_launch - queued),
        staged=at_once * max(reducer.staged for reducer in reducers)
        if outer.sends_from_host
        else 0,
    )


def _in_flight(schedule: SyncSchedule) -> int:
    """Return how many fragments are in flight at once, at most; 1 without overlap."""
    return max(1, schedule.most_in_flight())


def _largest(sizes: Sequence[int], count: int) -> int:
    """Return the sum of the ``count`` largest sizes."""
    return sum(sorted(sizes, reverse=True)[:count])


# ------------------------------------------------------------------------------------------
# Buffers of the matrix exchange, `optim.exchange`.


def exchange_bytes(config: RunConfig, topology: Topology) -> int:
    """Return the bytes that the exchange keeps between steps on the fullest rank; 0 without Muon.

    A rank keeps updates in fp32 for each element that it holds, taken as an even share. In the
    dtype of the exchange it keeps what it sends (as many elements), what it receives as an owner
    (all elements of its matrices), and the largest batch of matrices that it computes at once. A
    stage of one rank sends nothing. All pipeline stages have equal matrices.
    """
    if not isinstance(config.inner, MuonInner):
        return 0
    accelerator = planned_on_accelerator(config)
    wire = BYTES[config.inner.muon.wire_dtype(accelerator=accelerator)]
    matrices = stage_matrices(config, topology, accelerator=accelerator)
    ranks = topology.stage_size
    held = -(-sum(matrix.numel for matrix in matrices) // ranks)
    if ranks == 1:
        return 4 * held + wire * largest_batch(matrices)
    owners = assign(matrices, ranks).owners
    buckets = divide(matrices, owners, config.inner.muon.exchange_chunks)
    as_owner = 0
    for rank in range(ranks):
        owned = [[matrices[i] for i in bucket if owners[i] == rank] for bucket in buckets]
        received = sum(matrix.numel for bucket in owned for matrix in bucket)
        as_owner = max(as_owner, received + max(map(largest_batch, owned), default=0))
    return (4 + wire) * held + wire * as_owner


# ------------------------------------------------------------------------------------------
# All memory of a rank.


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of the rank that needs most.

    Attributes:
        stage: Pipeline stage of the rank.
        weights: Parameters in the precision of the forward pass.
        gradients: Gradient buffer in the accumulation dtype.
        masters: fp32 masters; 0 where fp32 parameters are their own masters.
        inner_state: Momentum and moments, fp32.
        exchange: Buffers of the matrix exchange.
        anchor: Anchor, fp32; 0 without outer steps.
        outer_momentum: Outer momentum, fp32; 0 without outer steps.
        outer_step: Memory of outer steps besides this state.
        outer_on_host: Whether anchor and outer momentum are in host memory.
    """

    stage: int
    weights: int
    gradients: int
    masters: int
    inner_state: int
    exchange: int
    anchor: int
    outer_momentum: int
    outer_step: OuterMemory
    outer_on_host: bool

    @property
    def outer_state(self) -> int:
        """Bytes of anchor and outer momentum."""
        return self.anchor + self.outer_momentum

    @property
    def host(self) -> int:
        """Bytes in host memory."""
        return (self.outer_state if self.outer_on_host else 0) + self.outer_step.staged

    @property
    def device(self) -> int:
        """Bytes in device memory at the peak of an outer step, without activations."""
        kept = 0 if self.outer_on_host else self.outer_state
        return (
            self.weights
            + self.gradients
            + self.masters
            + self.inner_state
            + self.exchange
            + kept
            + self.outer_step.device
        )


def memory_plan(config: RunConfig, topology: Topology) -> MemoryPlan:
    """Return the memory of the fullest rank; the first stage wins ties.

    Only ranks of tensor-parallel rank 0 are considered: they also hold the anchor of the norms.
    """
    exchange = exchange_bytes(config, topology)
    plans = [
        _rank_memory(config, topology, part, shards, exchange)
        for part in stage_slices(config.model, topology)
        for shards in stage_shards(config, topology, stage=part.stage, tp_rank=0)
    ]
    return max(plans, key=lambda plan: plan.device + plan.host)


def _rank_memory(
    config: RunConfig, topology: Topology, part: Slice, shards: Sequence[Shard], exchange: int
) -> MemoryPlan:
    """Return the memory of the rank of a stage that has these shards."""
    training, outer = config.training, config.outer
    has_outer = not isinstance(outer, NoOuter)
    held = sum(shard.numel for shard in shards)
    owned = sum(shard.numel for shard in shards if shard.param.is_primary) if has_outer else 0
    moments = 2 * held
    if isinstance(config.inner, MuonInner):
        moments -= sum(shard.numel for shard in shards if not is_vector(shard.param))
    return MemoryPlan(
        stage=part.stage,
        weights=part.total * BYTES[training.precision],
        gradients=part.total * BYTES[training.accumulate_dtype],
        masters=0 if training.precision == "fp32" else 4 * held,
        inner_state=4 * moments,
        exchange=exchange,
        anchor=4 * owned,
        outer_momentum=4 * owned,
        outer_step=outer_memory(config, topology, shards),
        outer_on_host=not isinstance(outer, NoOuter) and outer.state_device == "cpu",
    )
