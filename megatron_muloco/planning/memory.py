"""Bytes that one rank holds for weights, gradients and optimizer state.

Megatron's distributed optimizer keeps weights and gradients of the rank's slice whole and divides
masters and moments evenly over data-parallel (x context-parallel) ranks. Anchor and outer momentum
are divided like the masters, and so is what an outer step needs (`outer_memory`). The buffers in
which matrices travel follow their owners (`exchange_memory`). Activations, other temporary buffers
and the allocator's slack are not counted; Megatron pads buffers by at most a few kilobytes per
bucket.
"""

from dataclasses import dataclass

from megatron_muloco.config.inner import MuonInner
from megatron_muloco.config.outer import NoOuter
from megatron_muloco.config.schema import RunConfig
from megatron_muloco.planning.exchange_memory import exchange_bytes
from megatron_muloco.planning.outer_memory import OuterMemory, outer_memory
from megatron_muloco.planning.slices import BYTES, Slice, stage_slices
from megatron_muloco.topology import Topology

__all__ = ["MemoryPlan", "memory_plan"]


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes per rank, on the pipeline stage that needs most.

    Attributes:
        stage: That stage.
        weights: Parameters in the precision of the forward pass.
        gradients: Gradient buffer in the accumulation dtype.
        masters: fp32 masters; 0 where fp32 parameters are their own masters.
        inner_state: Momentum and moments, fp32.
        exchange: What the exchange of matrices keeps between steps.
        anchor: fp32.
        outer_momentum: fp32; none without momentum.
        outer_step: What outer steps need beside their state; always on the device.
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
        """Anchor and outer momentum."""
        return self.anchor + self.outer_momentum

    @property
    def host(self) -> int:
        """Bytes in host memory."""
        return self.outer_state if self.outer_on_host else 0

    @property
    def device(self) -> int:
        """Bytes in device memory in the middle of an outer step, activations not included."""
        kept = 0 if self.outer_on_host else self.outer_state
        step = self.outer_step
        return (
            self.weights
            + self.gradients
            + self.masters
            + self.inner_state
            + self.exchange
            + kept
            + step.buffers
            + step.at_launch
            + step.temporary
        )


def memory_plan(config: RunConfig, topology: Topology) -> MemoryPlan:
    """Return the bytes of the fullest rank; ties go to the first stage."""
    plans = [_stage_memory(config, topology, part) for part in stage_slices(config.model, topology)]
    return max(plans, key=lambda plan: plan.device + plan.host)


def _stage_memory(config: RunConfig, topology: Topology, part: Slice) -> MemoryPlan:
    """Return the bytes of tensor-parallel rank 0 of a stage, which holds the norms' anchor too."""
    training, outer = config.training, config.outer
    shards = topology.sharding
    moments = 2 * part.total
    if isinstance(config.inner, MuonInner):
        moments -= part.matrices
    has_outer = not isinstance(outer, NoOuter)
    synchronised = part.synchronised(tp_rank=0) if has_outer else 0
    return MemoryPlan(
        stage=part.stage,
        weights=part.total * BYTES[training.precision],
        gradients=part.total * BYTES[training.accumulate_dtype],
        masters=0 if training.precision == "fp32" else _share(part.total, shards) * 4,
        inner_state=_share(moments, shards) * 4,
        exchange=exchange_bytes(config, topology),
        anchor=_share(synchronised, shards) * 4,
        outer_momentum=0 if isinstance(outer, NoOuter) else _share(synchronised, shards) * 4,
        outer_step=outer_memory(config, topology, stage=part.stage, tp_rank=0),
        outer_on_host=not isinstance(outer, NoOuter) and outer.state_device == "cpu",
    )


def _share(elements: int, ranks: int) -> int:
    """Return the largest even share."""
    return -(-elements // ranks)
