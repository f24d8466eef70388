"""Bytes that one rank holds for weights, gradients and optimizer state.

Megatron's distributed optimizer keeps weights and gradients of the rank's slice whole and divides
masters and moments over data-parallel (x context-parallel) ranks, evenly but for padding; which
values a rank gets is known (`rank_shards`), and with it how many moments they have and to which
fragments they belong. Anchor and outer momentum are divided like the masters, and so is what an
outer step needs (`outer_memory`). The buffers in which matrices travel follow their owners
(`exchange_memory`). Activations, other temporary buffers and the allocator's slack are not counted;
Megatron pads buffers by at most a few kilobytes per bucket.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_muloco.config.inner import MuonInner
from megatron_muloco.config.outer import NoOuter
from megatron_muloco.config.schema import RunConfig
from megatron_muloco.optim.units import is_vector
from megatron_muloco.planning.exchange_memory import exchange_bytes
from megatron_muloco.planning.outer_memory import OuterMemory, outer_memory
from megatron_muloco.planning.rank_shards import stage_shards
from megatron_muloco.planning.slices import BYTES, Slice, stage_slices
from megatron_muloco.shards import Shard
from megatron_muloco.topology import Topology

__all__ = ["MemoryPlan", "memory_plan"]


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of the rank that needs most.

    Attributes:
        stage: Its pipeline stage.
        weights: Parameters in the precision of the forward pass.
        gradients: Gradient buffer in the accumulation dtype.
        masters: fp32 masters; 0 where fp32 parameters are their own masters.
        inner_state: Momentum and moments, fp32.
        exchange: What the exchange of matrices keeps between steps.
        anchor: fp32.
        outer_momentum: fp32; none without momentum.
        outer_step: What outer steps need beside their state.
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
        return (self.outer_state if self.outer_on_host else 0) + self.outer_step.staged

    @property
    def device(self) -> int:
        """Bytes in device memory in the middle of an outer step, activations not included."""
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
    """Return the bytes of the fullest rank; ties go to the first stage.

    It is one of tensor-parallel rank 0, which holds the norms' anchor too.
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
    """Return the bytes of the rank of a stage that has these shards."""
    training, outer = config.training, config.outer
    has_outer = not isinstance(outer, NoOuter)
    held = sum(shard.numel for shard in shards)
    owned = sum(shard.numel for shard in shards if not shard.param.duplicate) if has_outer else 0
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
