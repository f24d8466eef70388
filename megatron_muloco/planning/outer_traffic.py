"""Bytes that one rank sends to other replicas, counted exactly as the reducers send them.

A launch carries the rank's shards of a fragment, and one row per replica::

    [ weight | norm | lines of the console | sketch ]       fp32

Ranks at the same position of different replicas hold the same shards, but where chunks are encoded
they own different chunks, and so send different numbers of bytes.
"""

from collections.abc import Sequence

from megatron_muloco.comm.chunks import (
    chunk_pieces,
    encoded_wire_bytes,
    payload_sizes,
    row_places,
    uncoded_wire_bytes,
)
from megatron_muloco.compress.spec import payload_size, spec_of
from megatron_muloco.config.compression import (
    CodeConfig,
    CompressionConfig,
    NoCompression,
    TopKCompression,
)
from megatron_muloco.config.derived import derive
from megatron_muloco.config.outer import AverageOuter, NesterovOuter, NoOuter
from megatron_muloco.config.schema import RunConfig
from megatron_muloco.monitor.lines import LineCalendar
from megatron_muloco.outer.schedule import SyncSchedule
from megatron_muloco.planning.rank_shards import by_fragment, rank_shards
from megatron_muloco.planning.slices import BYTES
from megatron_muloco.shards import Shard
from megatron_muloco.topology import Coords, Topology

__all__ = [
    "chunk_payloads",
    "mean_wire_bytes",
    "outer_bytes",
    "round_bytes",
    "sketch_width",
    "uncoded_bytes",
]

_SKETCH_VALUES = 4096  # of a replica: cosines to 1 / sqrt(4096) = 0.016 and better
_LEAST_SKETCH_VALUES = 256  # of a rank, however many ranks share the fragment: 0.06


def sketch_width(config: RunConfig, topology: Topology) -> int:
    """Return the numbers of one rank's sketch of a fragment; 0 where replicas are not compared."""
    if topology.num_replicas == 1 or not config.monitor.pseudogradient_interval:
        return 0
    return max(_SKETCH_VALUES // topology.replica_size, _LEAST_SKETCH_VALUES)


def outer_bytes(
    config: RunConfig, topology: Topology, coords: Coords, *, sketch: bool = True
) -> int:
    """Return the bytes that one rank sends in a round.

    Args:
        config: A checked config.
        topology: The layout of the world.
        coords: The rank's place in it.
        sketch: Whether it is a round that compares replicas.
    """
    shards = rank_shards(config, topology, coords)
    return round_bytes(config, topology, shards, sketch=sketch)[coords.replica]


def round_bytes(
    config: RunConfig, topology: Topology, shards: Sequence[Shard], *, sketch: bool = True
) -> list[int]:
    """Return what the ranks with these shards send in a round, replica by replica."""
    outer, sent = config.outer, [0] * topology.num_replicas
    if isinstance(outer, NoOuter):
        return sent
    numbers = 1 + _lines(config, outer)
    width = sketch_width(config, topology) if sketch else 0
    for fragment in by_fragment(config, shards):
        riders = numbers + (width if fragment else 0)
        launch = _launch_bytes(outer.compression, fragment, topology.num_replicas, riders)
        sent = [total + more for total, more in zip(sent, launch, strict=True)]
    return sent


def uncoded_bytes(config: RunConfig, topology: Topology, shards: Sequence[Shard]) -> int:
    """Return what fp32 all-reduces of a round's values alone would send."""
    return sum(
        uncoded_wire_bytes(_numel(fragment), topology.num_replicas)
        for fragment in by_fragment(config, shards)
    )


def _launch_bytes(
    code: CompressionConfig, shards: Sequence[Shard], num_replicas: int, riders: int
) -> list[int]:
    """Return what one launch of a fragment's shards sends, by replica."""
    if isinstance(code, NoCompression):
        mean = mean_wire_bytes(
            _numel(shards), num_replicas, code.wire_dtype, riders, deterministic=code.deterministic
        )
        return [mean] * num_replicas
    sizes = chunk_payloads(code, shards, num_replicas)
    if isinstance(code, TopKCompression):
        return [(num_replicas - 1) * (4 * (1 + riders) + sum(sizes))] * num_replicas
    return [encoded_wire_bytes(sizes, index, riders) for index in range(num_replicas)]


def chunk_payloads(code: CodeConfig, shards: Sequence[Shard], num_replicas: int) -> list[int]:
    """Return the bytes of a fragment's chunks in a code; top-k has one chunk."""
    chunks = chunk_pieces(
        [(shard.name, shard.numel) for shard in shards],
        1 if isinstance(code, TopKCompression) else num_replicas,
        row_places(shards),
    )
    return payload_sizes(chunks, lambda name: payload_size(spec_of(code, name)))


def mean_wire_bytes(
    elements: int,
    num_replicas: int,
    wire_dtype: str,
    riders: int = 0,
    *,
    deterministic: bool = False,
) -> int:
    """Return the bytes that one rank sends for an uncompressed mean over the outer group.

    Args:
        elements: Values of the rank's shards.
        num_replicas: K, the size of the outer group.
        wire_dtype: ``fp32`` is an all-reduce of one buffer; ``bf16`` is an all-to-all of chunks and
            an all-gather of their means.
        riders: fp32 numbers of each replica that travel along, such as its loss.
        deterministic: ``fp32`` travels like ``bf16``, in chunks.
    """
    if num_replicas == 1:
        return 0
    row = 1 + riders
    if wire_dtype == "fp32" and not deterministic:
        return uncoded_wire_bytes(elements + num_replicas * row, num_replicas)
    chunk = -(-elements // num_replicas)
    chunk += chunk % 2  # the reducer keeps chunks even, so that fp32 rows stay aligned
    return (num_replicas - 1) * (row * BYTES["fp32"] + 2 * chunk * BYTES[wire_dtype])


def _numel(shards: Sequence[Shard]) -> int:
    return sum(shard.numel for shard in shards)


def _lines(config: RunConfig, outer: NesterovOuter | AverageOuter) -> int:
    """Return the numbers of the console lines that ride with a launch."""
    schedule = SyncSchedule(
        sync_interval=outer.sync_interval,
        train_iters=derive(config).train_iters,
        fragment_count=outer.fragments.count,
        overlap_steps=outer.overlap_steps,
    )
    return LineCalendar(config.monitor.log_interval, schedule).rider_count()
