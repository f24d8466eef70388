"""`estimate` adds closed forms and the simulation up to the plan of a run; `warnings` reads it."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from megatron_muloco.config import Derived, RunConfig, derive
from megatron_muloco.config.outer import NoOuter, interval_at, interval_values
from megatron_muloco.planning.memory import MemoryPlan, checkpoint_bytes, memory_plan
from megatron_muloco.planning.simulation import (
    Layered,
    fewest_overlap_steps,
    layered_rounds,
    steady_share,
    trainer_rounds,
)
from megatron_muloco.planning.timing import (
    BACKWARD_SHARE,
    Failures,
    Rates,
    StepTime,
    data_parallel_bits,
    failures,
    smallest_rate,
    step_time,
)
from megatron_muloco.planning.traffic import launch_bytes
from megatron_muloco.topology import Topology

__all__ = ["COPY_RATE", "SHARES", "Estimate", "estimate"]

SHARES = (0.5, 0.8, 0.9, 0.95, 0.99)
"""Shares of computing time whose bandwidth is printed, as in the papers."""

COPY_RATE = 10e9
"""Bytes per second from a GPU to host memory, for a save in the background. Assumed."""

_HIDDEN = 1 - 1e-9  # share of a round with nothing exposed, but for rounding


@dataclass(frozen=True)
class Estimate:
    """A run's time and what goes into it.

    Attributes:
        config: The run.
        topology: Of its world.
        rates: Of its machine.
        sites: Groups of ranks between which data parallelism would cross the link.
        step: An inner step.
        bits: Bits of each fragment that a replica sends; none without an exchange.
        data_parallel: Bits of gradients and parameters that a site sends in each step; zero where
            the run is in one site.
    """

    config: RunConfig
    topology: Topology
    rates: Rates
    sites: int
    step: StepTime
    bits: tuple[float, ...]
    data_parallel: tuple[float, float]

    @cached_property
    def derived(self) -> Derived:
        """Length and rounds of the run."""
        return derive(self.config, self.topology)

    @property
    def interval(self) -> int:
        """Longest H; 1 for data parallelism."""
        outer = self.config.outer
        return 1 if isinstance(outer, NoOuter) else max(interval_values(outer.sync_interval))

    @property
    def exchange_bits(self) -> float:
        """Bits that a replica or site sends in one round."""
        return sum(self.bits) or sum(self.data_parallel)

    # ---- utilisation ------------------------------------------------------------------------

    def share_at(self, rate: float, interval: int | None = None) -> float:
        """Return the share of a round that computes at a rate, in bits per second of payload."""
        t, outer = self.step.seconds, self.config.outer
        if not self.exchange_bits:
            return 1.0
        if isinstance(outer, NoOuter):
            gradients, parameters = self.data_parallel
            layers = Layered(self.config.model.num_layers, t, gradients)
            reduced = t / steady_share(layered_rounds(layers), rate)
            return t / (reduced + parameters / rate)
        rounds = trainer_rounds(interval or self.interval, self.bits, outer.overlap_steps, t)
        return steady_share(rounds, rate)

    @cached_property
    def share(self) -> float:
        """Share of a round of the longest H that computes, at the link's payload."""
        return self.share_at(self.rates.payload)

    def rate_for(self, share: float) -> float | None:
        """Return the nominal rate of a link with which a share computes."""
        payload = smallest_rate(share, self.share_at) if self.exchange_bits else 0.0
        return None if payload is None else payload / self.rates.efficiency.value

    @property
    def exchange_seconds(self) -> float:
        """Seconds on the link of one round."""
        return self.exchange_bits / self.rates.payload

    def hiding_overlap(self) -> int | None:
        """Return the fewest tau with which nothing of the exchange is exposed."""
        return fewest_overlap_steps(
            self.interval, self.bits, self.step.seconds, self.rates.payload, _HIDDEN
        )

    # ---- the run ----------------------------------------------------------------------------

    @cached_property
    def train_seconds(self) -> float:
        """Seconds of inner and outer steps; a ramp-up of the batch counts by its tokens."""
        derived, step = self.derived, self.step
        full = derived.train_tokens / derived.tokens_per_step
        whole = full * (step.compute + step.imbalance)
        whole += derived.train_iters * (step.bubble + step.newton_schulz)
        return whole + self.exposed_seconds

    @cached_property
    def exposed_seconds(self) -> float:
        """Seconds of the run that wait for the link."""
        derived, outer, t = self.derived, self.config.outer, self.step.seconds
        if isinstance(outer, NoOuter):
            return derived.train_iters * t * (1 / self.share - 1)
        lengths = Counter(
            interval_at(outer.sync_interval, number) for number in range(1, derived.rounds + 1)
        )
        exposed = sum(
            count * steps * t * (1 / self.share_at(self.rates.payload, steps) - 1)
            for steps, count in lengths.items()
        )
        return exposed + (self.exchange_seconds if derived.flushed_steps else 0.0)

    @property
    def evaluation_seconds(self) -> float:
        """Seconds of evaluations: forward passes of global batches."""
        training = self.config.training
        if not training.eval_interval:
            return 0.0
        batches = self.derived.train_iters // training.eval_interval * training.eval_iters
        return batches * (1 - BACKWARD_SHARE) * (self.step.compute + self.step.imbalance)

    @cached_property
    def checkpoint(self) -> int:
        """Bytes of one checkpoint."""
        return checkpoint_bytes(self.config, self.topology)

    @property
    def write_seconds(self) -> float:
        """Seconds until a checkpoint is written."""
        return self.checkpoint / self.rates.writing.value

    @property
    def held_seconds(self) -> float:
        """Seconds for which a save holds training."""
        if self.config.checkpoint.async_save:
            return min(self.memory.saved / COPY_RATE, self.write_seconds)
        return self.write_seconds

    @cached_property
    def memory(self) -> MemoryPlan:
        """Memory of the fullest rank."""
        return memory_plan(self.config, self.topology)

    @property
    def seconds(self) -> float:
        """Seconds of the run without checkpoints and failures."""
        return self.train_seconds + self.evaluation_seconds

    @cached_property
    def failures(self) -> Failures:
        """Checkpoints and failures."""
        every = self.config.checkpoint.save_interval
        interval = every * self.train_seconds / self.derived.train_iters if every else None
        return failures(self.topology.world_size, self.rates, self.held_seconds, interval)

    @property
    def days(self) -> float | None:
        """Days with failures and Daly's checkpoints; ``None`` where nothing gets done."""
        goodput = self.failures.goodput
        return self.seconds / goodput / 86400 if goodput > 1e-6 else None

    @property
    def gpu_hours(self) -> float | None:
        """GPU hours of these days."""
        return None if self.days is None else 24 * self.days * self.topology.world_size

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all replicas per second of training."""
        return self.derived.train_tokens / self.train_seconds


def estimate(
    config: RunConfig,
    topology: Topology,
    rates: Rates,
    *,
    sites: int = 1,
    hierarchical: bool = False,
) -> Estimate:
    """Return the estimate of a checked config.

    Args:
        config: The run.
        topology: Of its world.
        rates: Of its machine.
        sites: Groups of ranks, each behind one link, that data parallelism spans.
        hierarchical: Whether data parallelism reduces inside sites first.
    """
    bits: tuple[float, ...] = ()
    across = (0.0, 0.0)
    if isinstance(config.outer, NoOuter):
        if sites > 1:
            across = data_parallel_bits(config, topology, sites, hierarchical=hierarchical)
    elif topology.num_replicas > 1:
        bits = tuple(8.0 * sent for sent in launch_bytes(config, topology))
    step = step_time(config, topology, rates)
    return Estimate(config, topology, rates, sites, step, bits, across)
