"""Memory of an outer step beside anchor and momentum, as synchronizer and reducers hold it.

For the largest fragment of a rank, in bytes per value, K replicas, w bytes on the wire::

    kept between rounds, per fragment in flight   fp32 4 (one flat buffer)   bf16 3w (2w if K = 1)
    copies of the local values at launch          4 per fragment in flight, none without overlap
    while a fragment is launched                  4 (the pseudogradient)
    while it is waited for                        fp32 0   bf16 4 + about 2 (the sum of chunks)
    while it is averaged after the last round     4 and a flat fp32 buffer of its own, 4

Riders, sketches and padding are not counted: a few hundred kilobytes.
"""

from dataclasses import dataclass

from megatron_muloco.config.compression import NoCompression
from megatron_muloco.config.derived import derive
from megatron_muloco.config.outer import AverageOuter, NesterovOuter, NoOuter
from megatron_muloco.config.schema import RunConfig
from megatron_muloco.outer.schedule import Average, SyncSchedule
from megatron_muloco.planning.slices import BYTES, fragment_shares
from megatron_muloco.topology import Topology

__all__ = ["OuterMemory", "outer_memory", "schedule_of"]


@dataclass(frozen=True, slots=True)
class OuterMemory:
    """Bytes of one rank.

    Attributes:
        in_flight: Fragments that are under way at once, at most.
        buffers: What travels; kept between rounds.
        at_launch: Local values at the launches of the fragments in flight.
        temporary: What an outer step needs on top, at its fullest moment.
    """

    in_flight: int
    buffers: int
    at_launch: int
    temporary: int


def outer_memory(config: RunConfig, topology: Topology, *, stage: int, tp_rank: int) -> OuterMemory:
    """Return what outer steps need on one rank, all fragments as large as the largest."""
    outer = config.outer
    if isinstance(outer, NoOuter):
        return OuterMemory(0, 0, 0, 0)
    largest = max(fragment_shares(config, topology, stage, tp_rank))
    schedule = schedule_of(config, outer)
    number, fp32 = _in_flight(schedule), BYTES["fp32"]
    buffers, waiting = _reducer_bytes(outer, largest, topology.num_replicas)
    at_launch = number * largest * fp32 if outer.overlap_steps else 0
    averages = any(isinstance(event, Average) for event in schedule.flush_events())
    flushing = 2 * largest * fp32 if averages else 0  # then nothing is in flight
    return OuterMemory(
        in_flight=number,
        buffers=number * buffers,
        at_launch=at_launch,
        temporary=max(largest * fp32, waiting, flushing - at_launch),
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
    """Return how many fragments are under way at once; the second interval is like all others."""
    first = schedule.sync_interval + 1
    steps = range(first, first + schedule.sync_interval)
    return max(1, *(len(schedule.in_flight(step)) for step in steps))


def _reducer_bytes(
    outer: NesterovOuter | AverageOuter, elements: int, num_replicas: int
) -> tuple[int, int]:
    """Return what `comm.reducers` keep for a fragment, and what waiting for it takes on top."""
    fp32 = BYTES["fp32"]
    code = outer.compression
    if not isinstance(code, NoCompression) or code.wire_dtype == "fp32":
        return elements * fp32, 0
    copies = 3 if num_replicas > 1 else 2  # values, payloads and what arrives
    pairs = num_replicas // 2  # first sums of neighbours, beside all chunks in fp32
    waiting = elements * fp32 * (num_replicas + pairs) // num_replicas
    return copies * elements * BYTES[code.wire_dtype], waiting
