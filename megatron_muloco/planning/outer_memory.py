"""Memory of an outer step beside anchor and momentum, as synchronizer and reducers hold it.

For each fragment of a rank, in bytes per value::

    kept between rounds, per fragment in flight   what travels (`reducer_memory`)
    copies of the local values at launch          4 per fragment in flight, none without overlap
    error feedback                                4, and 4/K where the mean is encoded again
    while a fragment is launched                  4 (the pseudogradient), and what encoding takes
    while it is averaged after the last round     4 and a flat fp32 buffer of its own, 4

Overlapped codes, and everything overlapped that travels through the host, are worked on by a
communication thread, one fragment after the other. What travels is then kept once, and each
fragment in flight holds 4 until it is applied: its pseudogradient, later its mean.

Riders, sketches and padding are not counted: a few hundred kilobytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_muloco.config.derived import derive
from megatron_muloco.config.outer import AverageOuter, NesterovOuter, NoOuter
from megatron_muloco.config.schema import RunConfig
from megatron_muloco.outer.schedule import Average, SyncSchedule
from megatron_muloco.planning.rank_shards import by_fragment
from megatron_muloco.planning.reducer_memory import reducer_memory, residual_bytes
from megatron_muloco.planning.slices import BYTES
from megatron_muloco.shards import Shard
from megatron_muloco.topology import Topology

__all__ = ["OuterMemory", "outer_memory", "schedule_of"]


@dataclass(frozen=True, slots=True)
class OuterMemory:
    """Bytes of one rank.

    Attributes:
        in_flight: Fragments that are under way at once, at most.
        buffers: What travels; kept between rounds.
        queued: Pseudogradients and means in the hands of a communication thread.
        at_launch: Local values at the launches of the fragments in flight.
        residuals: What error feedback keeps.
        temporary: What an outer step needs on top, at its fullest moment.
        staged: Copies of what travels in host memory.
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
    """Return what outer steps need on a rank with these shards.

    The fragments in flight are taken to be the largest ones.
    """
    outer, replicas = config.outer, topology.num_replicas
    if isinstance(outer, NoOuter):
        return OuterMemory(0, 0, 0, 0, 0, 0, 0)
    fragments = by_fragment(config, shards)
    code, schedule = outer.compression, schedule_of(config, outer)
    reducers = [reducer_memory(code, fragment, replicas) for fragment in fragments]
    values = [BYTES["fp32"] * sum(shard.numel for shard in part) for part in fragments]
    number, in_thread = _in_flight(schedule), outer.reduces_in_thread
    largest, at_once = max(values), 1 if in_thread else number
    at_launch = _largest(values, number) if outer.overlap_steps else 0
    queued = _largest(values, number) if in_thread else 0
    flushing = 0
    if any(isinstance(event, Average) for event in schedule.flush_events()):
        flushing = 2 * largest  # then nothing is in flight
    launching = max(reducer.launching for reducer in reducers) + (0 if in_thread else largest)
    waiting = max(reducer.waiting for reducer in reducers)
    if in_thread:
        waiting = max(waiting, largest)  # the mean leaves the reducer's memory for its own
    return OuterMemory(
        in_flight=number,
        buffers=at_once * max(reducer.buffers for reducer in reducers),  # each grows to the largest
        queued=queued,
        at_launch=at_launch,
        residuals=residual_bytes(code, fragments, replicas),
        temporary=max(launching, waiting, flushing - at_launch - queued),
        staged=at_once * max(reducer.staged for reducer in reducers)
        if outer.sends_from_host
        else 0,
    )


def schedule_of(config: RunConfig, outer: NesterovOuter | AverageOuter) -> SyncSchedule:
    """Return the calendar of a run's outer steps."""
    return SyncSchedule(
        sync_interval=outer.sync_interval,
        train_iters=derive(config).train_iters,
        fragment_count=outer.fragments.count,
        overlap_steps=outer.overlap_steps,
    )


def _in_flight(schedule: SyncSchedule) -> int:
    """Return how many fragments are under way at once, or launched and waited for, at most."""
    return max(1, schedule.most_in_flight())


def _largest(sizes: Sequence[int], count: int) -> int:
    """Return the sum of the ``count`` largest sizes."""
    return sum(sorted(sizes, reverse=True)[:count])
