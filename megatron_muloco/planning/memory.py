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

from megatron_muloco.comm.costs import reducer_cost
from megatron_muloco.config.derived import derive, stage_layers
from megatron_muloco.config.inner import MuonInner
from megatron_muloco.config.outer import NoOuter
from megatron_muloco.config.schema import RunConfig
from megatron_muloco.optim.matrices import is_vector
from megatron_muloco.optim.parameter_table import assign
from megatron_muloco.optim.routing import exchange_buffer_bytes
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
from megatron_muloco.planning.traffic import planned_on_accelerator
from megatron_muloco.topology import Topology

__all__ = [
    "MemoryPlan",
    "OuterMemory",
    "exchange_bytes",
    "memory_plan",
    "outer_memory",
]


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
# Without one (on accelerators, unless the host sends) each fragment in flight holds buffers, and
# between two phases nothing else.


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
    schedule = SyncSchedule.from_config(outer, derive(config).train_iters)
    reducers = [reducer_cost(outer.compression, fragment, replicas) for fragment in fragments]
    values = [BYTES["fp32"] * sum(shard.numel for shard in part) for part in fragments]
    number = _in_flight(schedule)
    in_thread = outer.reduces_in_thread(accelerator=planned_on_accelerator(config))
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
        residuals=sum(reducer.residuals for reducer in reducers),
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


def exchange_bytes(config: RunConfig, topology: Topology, *, stage: int = 0) -> int:
    """Return the bytes that the exchange keeps on a stage's fullest rank; 0 without Muon.

    Stages with the same number of layers have equal matrices, and keep the same.
    """
    if not isinstance(config.inner, MuonInner):
        return 0
    accelerator, muon = planned_on_accelerator(config), config.inner.muon
    matrices = stage_matrices(config, topology, stage=stage, accelerator=accelerator)
    return exchange_buffer_bytes(
        matrices,
        assign(matrices, topology.stage_size).owners,
        topology.stage_size,
        buckets=muon.exchange_chunks,
        wire_bytes=BYTES[muon.wire_dtype(accelerator=accelerator)],
    )


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
    layers = [len(stage) for stage in stage_layers(config, topology)]
    exchange = {
        number: exchange_bytes(config, topology, stage=layers.index(number))
        for number in set(layers)
    }
    plans = [
        _rank_memory(config, topology, part, shards, exchange[layers[part.stage]])
        for part in stage_slices(config, topology)
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
