"""Bytes that one rank needs: weights, gradients, optimizer state, activations, temporary buffers.

Megatron's distributed optimizer keeps the weights and gradients of a rank's slice whole, and
divides masters and moments over data-parallel (x context-parallel) ranks. The shards of each rank
are known (`planning.layout`), and with them their number of moments and their fragments. Anchor and
outer momentum are divided like the masters, and so are the buffers of outer steps. The buffers of
the matrix exchange depend on the owners of the matrices.

Activations are in `planning.activations`. What exists only in backward, in the inner optimizer's
step or in an outer step does not add up: the peak is the largest of the three.

Not counted: the microbatch itself, metadata and sketches (a few hundred kilobytes), and Megatron's
padding (a few kilobytes per bucket).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_muloco.comm.costs import reducer_cost
from megatron_muloco.config.derived import derive, stage_layers
from megatron_muloco.config.inner import MuonInner
from megatron_muloco.config.outer import NoOuter
from megatron_muloco.config.schema import RunConfig
from megatron_muloco.optim.matrices import MuonMatrix, is_vector
from megatron_muloco.optim.parameter_table import assign
from megatron_muloco.optim.routing import by_shape, divide, exchange_buffer_bytes
from megatron_muloco.outer.schedule import Average, SyncSchedule
from megatron_muloco.params import Shard
from megatron_muloco.planning.activations import Activations, stage_activations
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
    "ALLOCATOR_SLACK",
    "MemoryPlan",
    "OuterMemory",
    "checkpoint_bytes",
    "communicator_bytes",
    "exchange_bytes",
    "memory_plan",
    "newton_schulz_bytes",
    "outer_memory",
]


# ------------------------------------------------------------------------------------------
# Memory of outer steps, besides anchor and momentum.
#
# For each fragment of a rank, in bytes per value::
#
#     per fragment in flight                        the reducer's buffers
#     copies of the local values at launch          4 per fragment in flight, none without overlap
#     error feedback                                4, and 4/K where the mean is encoded again
#     while a fragment is launched                  4 (the pseudogradient; an fp32 all-reduce has it
#                                                   in its buffer), and what encoding takes
#     while it is averaged after the last round     4, and another flat fp32 buffer, 4
#
# A communication thread reduces one fragment after the other. The reducer's buffers then exist
# once, and each fragment in flight holds 4 until it is applied: its pseudogradient, later its mean.
# Without one (on accelerators, unless the host sends) each fragment in flight holds buffers, and
# between two phases nothing else. Where training waits for the outer step, the buffers are released
# before it goes on.


@dataclass(frozen=True, slots=True)
class OuterMemory:
    """Bytes of one rank.

    Attributes:
        in_flight: Number of fragments that are in flight at once, at most.
        buffers: Sent and received buffers of fragments that stay in flight while training goes on.
        queued: Pseudogradients and means held by the communication thread.
        at_launch: Copies of the local values at launch, for all fragments in flight.
        residuals: Residuals of error feedback.
        temporary: Additional bytes at the peak of an outer step, with its buffers where training
            waits for it.
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
    # The thread's pseudogradients are among what is queued.
    launching = max(reducer.launching for reducer in reducers) - (largest if in_thread else 0)
    waiting = max(reducer.waiting for reducer in reducers)
    buffers = at_once * max(reducer.buffers for reducer in reducers)
    kept = buffers if outer.overlap_steps else 0
    if in_thread:
        waiting = max(waiting, largest)  # the thread copies the mean out of the reducer's buffers
    return OuterMemory(
        in_flight=number,
        # Pooled buffers are shared by all fragments, and each grows to the largest.
        buffers=kept,
        queued=queued,
        at_launch=at_launch,
        residuals=sum(reducer.residuals for reducer in reducers),
        temporary=max(
            buffers - kept + max(launching, waiting), flushing - at_launch - queued - kept
        ),
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
# Temporary buffers of the inner optimizer's step.


def newton_schulz_bytes(
    matrices: Iterable[MuonMatrix], *, wire_bytes: int, value_bytes: int
) -> int:
    """Return the bytes that `newton_schulz.newton_schulz` allocates for a batch of equal matrices.

    Beside the batch itself. At the start, the quotient by the norm in fp32, and the batch in fp32
    where it is not; then the first, the old and the new X with two Gram matrices; at the end the
    fp32 result twice, for its factor or where a tall matrix was transposed.

    Args:
        matrices: A batch that `routing.by_shape` forms.
        wire_bytes: Bytes of an element of the batch.
        value_bytes: Bytes of an element of the iteration.
    """
    batch = list(matrices)
    numel = sum(matrix.numel for matrix in batch)
    rows, columns = batch[0].shape
    rows //= batch[0].blocks
    short, long = sorted((rows, columns))
    fp32, narrow = BYTES["fp32"], value_bytes < BYTES["fp32"]
    # Not plain, matrices are computed one after the other, with three small buffers for all.
    plain = batch[0].ns_impl == "plain"
    gram = 2 * numel * short // long if plain else 3 * short**2
    scaled = (fp32 if wire_bytes == fp32 else 2 * fp32) * numel
    iterated = value_bytes * ((3 if plain else 2) * numel + gram)
    transposed = value_bytes * numel if narrow and rows > columns else 0
    return max(scaled, iterated, transposed + 2 * fp32 * numel)


def _optimizer_step_bytes(config: RunConfig, shards: Sequence[Shard], newton_schulz: int) -> int:
    """Return the bytes that the inner step allocates on a rank with these shards."""
    held = sum(shard.numel for shard in shards)
    gradients = 0 if config.training.accumulate_dtype == "fp32" else 4 * held
    if not isinstance(config.inner, MuonInner):
        return gradients + 4 * held  # the root of the second moment, for all parameters at once
    vectors = sum(shard.numel for shard in shards if is_vector(shard.param))
    ahead = 4 * (held - vectors) if config.inner.muon.nesterov else 0
    return gradients + max(4 * vectors, ahead + newton_schulz)


def _largest_newton_schulz(config: RunConfig, topology: Topology, *, stage: int) -> int:
    """Return the memory of a stage's largest batch, as an owner computes it; 0 without Muon."""
    if not isinstance(config.inner, MuonInner):
        return 0
    accelerator, muon = planned_on_accelerator(config), config.inner.muon
    matrices = stage_matrices(config, topology, stage=stage, accelerator=accelerator)
    owners, size = assign(matrices, topology.stage_size).owners, topology.stage_size
    divided = divide(matrices, owners, muon.exchange_chunks) if size > 1 else [range(len(matrices))]
    batches = (
        batch
        for bucket in divided
        for rank in range(size)
        for batch in by_shape([matrices[i] for i in bucket if owners[i] == rank])
    )
    return max(
        newton_schulz_bytes(
            batch,
            wire_bytes=BYTES[muon.wire_dtype(accelerator=accelerator)],
            value_bytes=BYTES[muon.compute_dtype(accelerator=accelerator)],
        )
        for batch in batches
    )


# ------------------------------------------------------------------------------------------
# Memory outside torch's tensors, on accelerators.

# Reported for an all-reduce of 4 MB on A100 with NVLink, in NVIDIA/nccl#964: 544 MB for a group of
# two ranks, 688 MB for larger ones. NCCL makes a communicator at the first collective of a group.
# Its size depends on channels and topology (NVIDIA/nccl#986); not measured here.
_COMMUNICATOR_OF_TWO = 544_000_000
_COMMUNICATOR = 688_000_000

# Context, kernels and library handles of one process. Chosen: pytorch/pytorch#107667 has 300 MB for
# a small model, whose few kernels are loaded when they are first used. Not measured here.
_CONTEXT = 600_000_000

# Share of the peak that the caching allocator reserves without using it. Chosen: not measured here.
ALLOCATOR_SLACK = 0.05


def communicator_bytes(config: RunConfig, topology: Topology) -> int:
    """Return the bytes of a rank's NCCL communicators; groups of one rank have none.

    Counted are the groups that training uses: tensor, pipeline and data parallel, stage, replica,
    replicas (one for pseudogradients, unless host memory sends them, and one for the rest) and
    world.
    """
    tensor, pipeline, data = topology.tensor, topology.pipeline, topology.sharding
    axes = {"tp": tensor, "pp": pipeline, "dp": data}
    used = [("tp",), ("pp",), ("dp",), ("tp", "dp"), ("tp", "dp", "pp")]
    # Groups over axes of which one has more than one rank are the same group.
    distinct = {tuple(axis for axis in group if axes[axis] > 1) for group in used}
    sizes = [math.prod(axes[axis] for axis in group) for group in distinct]
    outer = config.outer
    sends = not isinstance(outer, NoOuter) and not outer.sends_from_host
    sizes += [topology.num_replicas] * (1 + sends) + [topology.world_size]
    return sum(_COMMUNICATOR_OF_TWO if size == 2 else _COMMUNICATOR for size in sizes if size > 1)


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
        activations: Activations of the stage.
        optimizer_step: Allocated during the inner optimizer's step.
        communicators: NCCL's communicators; 0 on CPUs.
        context: CUDA's context; 0 on CPUs.
        saved: Bytes that the rank writes of a checkpoint.
        saved_copy: Copy of them in host memory, for saves in the background; else 0.
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
    activations: Activations
    optimizer_step: int
    communicators: int
    context: int
    saved: int
    saved_copy: int

    @property
    def outer_state(self) -> int:
        """Bytes of anchor and outer momentum."""
        return self.anchor + self.outer_momentum

    @property
    def host(self) -> int:
        """Bytes in host memory."""
        kept = self.outer_state if self.outer_on_host else 0
        return kept + self.outer_step.staged + self.saved_copy

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

    @property
    def temporary(self) -> int:
        """Bytes at the peak of backward, of the inner optimizer's step or of an outer step."""
        return max(self.activations.peak, self.optimizer_step, self.outer_step.temporary)

    @property
    def allocated(self) -> int:
        """Bytes of tensors at the peak of a run, what ``max_memory_allocated`` counts."""
        return self.device - self.outer_step.temporary + self.temporary

    @property
    def slack(self) -> int:
        """Bytes that the allocator reserves and does not use; 0 on CPUs."""
        return int(ALLOCATOR_SLACK * self.allocated) if self.context else 0

    @property
    def needed(self) -> int:
        """Bytes of device memory that a rank needs in all."""
        return self.allocated + self.slack + self.communicators + self.context


def memory_plan(config: RunConfig, topology: Topology) -> MemoryPlan:
    """Return the memory of the fullest rank; the first stage wins ties.

    Only ranks of tensor-parallel rank 0 are considered: they also hold the anchor of the norms.
    """
    layers = [len(stage) for stage in stage_layers(config, topology)]
    # Stages with the same number of layers have equal matrices.
    matrices = {
        number: (
            exchange_bytes(config, topology, stage=layers.index(number)),
            _largest_newton_schulz(config, topology, stage=layers.index(number)),
        )
        for number in set(layers)
    }
    plans = [
        _rank_memory(config, topology, part, shards, *matrices[layers[part.stage]])
        for part in stage_slices(config, topology)
        for shards in stage_shards(config, topology, stage=part.stage, tp_rank=0)
    ]
    return max(plans, key=lambda plan: plan.needed + plan.host)


def _rank_memory(
    config: RunConfig,
    topology: Topology,
    part: Slice,
    shards: Sequence[Shard],
    exchange: int,
    newton_schulz: int,
) -> MemoryPlan:
    """Return the memory of the rank of a stage that has these shards."""
    training, outer = config.training, config.outer
    accelerator = planned_on_accelerator(config)
    has_outer = not isinstance(outer, NoOuter)
    held = sum(shard.numel for shard in shards)
    owned = sum(shard.numel for shard in shards if shard.param.is_primary) if has_outer else 0
    moments = 2 * held
    if isinstance(config.inner, MuonInner):
        moments -= sum(shard.numel for shard in shards if not is_vector(shard.param))
    outer_step = outer_memory(config, topology, shards)
    saved = _saved_bytes(config, topology, shards, outer_step, moments)
    saves_beside = config.checkpoint.async_save and config.checkpoint.dir is not None
    return MemoryPlan(
        stage=part.stage,
        weights=part.total * BYTES[training.precision],
        gradients=part.total * BYTES[training.accumulate_dtype],
        masters=0 if training.precision == "fp32" else 4 * held,
        inner_state=4 * moments,
        exchange=exchange,
        anchor=4 * owned,
        outer_momentum=4 * owned,
        outer_step=outer_step,
        outer_on_host=not isinstance(outer, NoOuter) and outer.state_device == "cpu",
        activations=stage_activations(config, topology, part.stage, accelerator=accelerator),
        optimizer_step=_optimizer_step_bytes(config, shards, newton_schulz),
        communicators=communicator_bytes(config, topology) if accelerator else 0,
        context=_CONTEXT if accelerator else 0,
        saved=saved,
        saved_copy=saved if saves_beside else 0,
    )


def checkpoint_bytes(config: RunConfig, topology: Topology) -> int:
    """Return the bytes of the tensors of one checkpoint, at most.

    With masters and as many fragments in flight as there can be. torch adds about 1.6 KB to each
    stored chunk.
    """
    # The shards of all data-parallel ranks of a stage; tensor-parallel rank 0 also has the norms.
    ranks = [
        _rank_memory(config, topology, part, shards, 0, 0).saved
        for part in stage_slices(config, topology)
        for shards in stage_shards(config, topology, stage=part.stage, tp_rank=0)
    ]
    return sum(ranks) * topology.tensor * topology.num_replicas


def _saved_bytes(
    config: RunConfig,
    topology: Topology,
    shards: Sequence[Shard],
    outer_step: OuterMemory,
    moments: int,
) -> int:
    """Return the bytes that a rank with these shards writes, as if parts were cut like shards.

    What replicas share is divided among them.
    """
    fp32, outer = BYTES["fp32"], config.outer
    owned = fp32 * sum(shard.numel for shard in shards if shard.param.is_primary)
    if isinstance(outer, NoOuter):
        return owned + fp32 * moments  # the anchor is the masters
    in_flight = 0
    if outer.overlap_steps:
        sizes = [
            fp32 * sum(shard.numel for shard in fragment)
            for fragment in by_fragment(config, shards)
        ]
        in_flight = _largest(sizes, outer_step.in_flight)
    shared = 2 * owned + in_flight  # anchor, momentum and means
    # The residual of the mean is held once for each chunk already, like a share.
    own = owned + fp32 * moments + outer_step.at_launch + outer_step.residuals
    return shared // topology.num_replicas + own
