"""Bytes that one rank sends to other replicas, counted exactly as the reducers send them.

A launch carries the rank's share of a fragment, and one row per replica::

    [ weight | norm | lines of the console | sketch ]       fp32

The share of a rank is exact without data parallelism. With it, Megatron pads the flat buffer that
it cuts into shards, so shares differ by that padding from the even cut that is counted here.
"""

from megatron_muloco.config.compression import NoCompression
from megatron_muloco.config.outer import AverageOuter, NesterovOuter, NoOuter
from megatron_muloco.config.schema import RunConfig
from megatron_muloco.monitor.lines import LineCalendar
from megatron_muloco.outer.schedule import SyncSchedule
from megatron_muloco.planning.slices import BYTES, fragment_shares
from megatron_muloco.topology import Topology

__all__ = ["mean_wire_bytes", "outer_bytes", "sketch_width"]

_SKETCH_VALUES = 4096  # of a replica: cosines to 1 / sqrt(4096) = 0.016 and better
_LEAST_SKETCH_VALUES = 256  # of a rank, however many ranks share the fragment: 0.06


def sketch_width(config: RunConfig, topology: Topology) -> int:
    """Return the numbers of one rank's sketch of a fragment; 0 where replicas are not compared."""
    if topology.num_replicas == 1 or not config.monitor.pseudogradient_interval:
        return 0
    return max(_SKETCH_VALUES // topology.replica_size, _LEAST_SKETCH_VALUES)


def outer_bytes(
    config: RunConfig, topology: Topology, *, stage: int, tp_rank: int, sketch: bool = True
) -> int:
    """Return the bytes that one rank sends in a round.

    Args:
        config: A checked config.
        topology: The layout of the world.
        stage: The rank's pipeline stage.
        tp_rank: Its place in the tensor-parallel group.
        sketch: Whether it is a round that compares replicas.
    """
    outer = config.outer
    if isinstance(outer, NoOuter) or topology.num_replicas == 1:
        return 0
    code = outer.compression
    if not isinstance(code, NoCompression):
        raise NotImplementedError(f"bytes of outer.compression.kind {code.kind} are not known")
    numbers = 1 + _lines(config, outer)
    width = sketch_width(config, topology) if sketch else 0
    sent = 0
    for share in fragment_shares(config, topology, stage, tp_rank):
        riders = numbers + (width if share else 0)
        sent += mean_wire_bytes(share, topology.num_replicas, code.wire_dtype, riders)
    return sent


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


def _lines(config: RunConfig, outer: NesterovOuter | AverageOuter) -> int:
    """Return the numbers of the console lines that ride with a launch."""
    schedule = SyncSchedule(
        sync_interval=outer.sync_interval,
        train_iters=outer.sync_interval,  # the calendar of lines does not depend on it
        fragment_count=outer.fragments.count,
        overlap_steps=outer.overlap_steps,
    )
    return LineCalendar(config.monitor.log_interval, schedule).rider_count()
