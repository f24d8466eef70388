"""Cost of each reducer: bytes sent, buffers, temporaries and residuals, by arithmetic.

One function for each reducer of `comm.reducers` and `comm.compressed`, for one fragment of one
rank. No torch, because the planner calls them. A change of a reducer changes its function here;
tests compare both, to the byte for what is sent and kept.

In bytes for each of the rank's n values, with w bytes per sent value, p bytes of payload per value,
K replicas, and u values in the largest unit, which takes E bytes to encode and D to decode::

                            buffers        in launch    in wait
    AllReduce               4              0, D_k and mean are in the buffer
    ChunkedAllReduce        3w             4            bf16 8; fp32 4 + about 2
    CompressedAllReduce     2p             4 + E / n    the larger of p / K + (4u + E) / n
                                                        and 4 + D / n
    CompressedAllGather     (1 + K) p      4 + E / n    4 + D / n
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_muloco.comm.chunking import (
    Piece,
    all_reduce_length,
    chunk_length,
    chunk_pieces,
    even_chunk_length,
    payload_sizes,
    ring_bytes,
    row_places,
    two_way_bytes,
)
from megatron_muloco.compress.codecs import format_of, main_format
from megatron_muloco.config.outer import CompressionConfig, LossyCompression, NoCompression
from megatron_muloco.params import Shard

__all__ = [
    "ReducerCost",
    "all_reduce_cost",
    "chunked_all_reduce_cost",
    "compressed_all_gather_cost",
    "compressed_all_reduce_cost",
    "reducer_cost",
]

_FP32 = 4
_VALUE_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, slots=True)
class ReducerCost:
    """Bytes for the reduction of one fragment on one rank.

    Rows of weight and metadata count in ``sent``, not in memory.

    Attributes:
        sent: Bytes that the rank sends, for launch and wait together, by its replica. They differ
            where ranks own different chunks.
        buffers: Bytes of sent and received buffers, held from launch to wait.
        launching: Additional bytes in `launch`, with the pseudogradients where they are not in
            ``buffers``.
        waiting: Additional bytes in `wait`, with the mean.
        staged: Bytes of copies in host memory, where tensors are sent through the host.
        residuals: Bytes that error feedback keeps.
    """

    sent: tuple[int, ...]
    buffers: int
    launching: int
    waiting: int
    staged: int
    residuals: int


def reducer_cost(
    compression: CompressionConfig,
    shards: Sequence[Shard],
    num_replicas: int,
    *,
    metadata_count: int = 0,
) -> ReducerCost:
    """Return the cost of the reducer that a config asks for.

    Args:
        compression: Section of the config.
        shards: The rank's shards in the fragment, in order.
        num_replicas: K.
        metadata_count: fp32 metadata values of each replica.
    """
    if isinstance(compression, NoCompression):
        numel, row = sum(shard.numel for shard in shards), 1 + metadata_count
        if compression.is_all_reduce:
            return all_reduce_cost(numel, num_replicas, row)
        width = _VALUE_BYTES[compression.wire_dtype]
        return chunked_all_reduce_cost(numel, num_replicas, row, value_bytes=width)
    cost = compressed_all_reduce_cost if compression.mean_is_encoded else compressed_all_gather_cost
    return cost(compression, shards, num_replicas, 1 + metadata_count)


# ------------------------------------------------------------------------------------------
# Uncompressed.


def all_reduce_cost(numel: int, num_replicas: int, row: int) -> ReducerCost:
    """Return the cost of `AllReduce` for ``numel`` values and rows of ``row`` fp32 numbers."""
    sent = ring_bytes(all_reduce_length(numel, num_replicas, row), num_replicas)
    fp32 = _FP32 * numel
    return ReducerCost((sent,) * num_replicas, fp32, 0, 0, staged=fp32, residuals=0)


def chunked_all_reduce_cost(
    numel: int, num_replicas: int, row: int, *, value_bytes: int
) -> ReducerCost:
    """Return the cost of `ChunkedAllReduce`; ``value_bytes`` is 4 or 2."""
    chunk = even_chunk_length(numel, num_replicas) * value_bytes
    sent = (num_replicas - 1) * (row * _FP32 + 2 * chunk)
    fp32, wire = _FP32 * numel, value_bytes * numel
    pairs = num_replicas // 2  # first sums of neighbours, besides all chunks in fp32
    summing = fp32 * (num_replicas + pairs) // num_replicas
    return ReducerCost(
        sent=(sent,) * num_replicas,
        buffers=3 * wire,  # values, messages, received
        launching=fp32,
        waiting=summing if value_bytes == _FP32 else 2 * fp32,  # bf16: before and after weighing
        staged=2 * wire,
        residuals=0,
    )


# ------------------------------------------------------------------------------------------
# Compressed.


def compressed_all_reduce_cost(
    compression: LossyCompression, shards: Sequence[Shard], num_replicas: int, row: int
) -> ReducerCost:
    """Return the cost of `CompressedAllReduce`."""
    chunks, sizes = _encoded(compression, shards, num_replicas)
    numel = sum(shard.numel for shard in shards)
    unit, payload_format = _largest_unit(chunks), main_format(compression)
    fp32, payload, own = _FP32 * numel, sum(sizes), max(sizes)
    buffers = payload + num_replicas * own
    owned = min(numel, chunk_length([(s.name, s.numel) for s in shards], num_replicas))
    averaging = _FP32 * unit + payload_format.encoding_bytes(unit)  # by the owner
    decoding = fp32 + payload_format.decoding_bytes(unit)  # of all chunks
    return ReducerCost(
        sent=tuple(two_way_bytes(sizes, index, row) for index in range(num_replicas)),
        buffers=buffers,
        launching=fp32 + payload_format.encoding_bytes(unit),
        waiting=max(own + averaging, decoding),
        staged=buffers,
        residuals=_FP32 * (numel + owned) if compression.error_feedback else 0,
    )


def compressed_all_gather_cost(
    compression: LossyCompression, shards: Sequence[Shard], num_replicas: int, row: int
) -> ReducerCost:
    """Return the cost of `CompressedAllGather`."""
    chunks, sizes = _encoded(compression, shards, 1)
    fp32, payload = _FP32 * sum(shard.numel for shard in shards), sum(sizes)
    unit, payload_format = _largest_unit(chunks), main_format(compression)
    buffers = (1 + num_replicas) * payload
    return ReducerCost(
        sent=((num_replicas - 1) * (_FP32 * row + payload),) * num_replicas,
        buffers=buffers,
        launching=fp32 + payload_format.encoding_bytes(unit),
        waiting=fp32 + payload_format.decoding_bytes(unit),  # the mean, and one replica's values
        staged=buffers,
        residuals=fp32 if compression.error_feedback else 0,
    )


def _encoded(
    compression: LossyCompression, shards: Sequence[Shard], chunk_count: int
) -> tuple[tuple[tuple[Piece, ...], ...], list[int]]:
    """Return the pieces and the payload bytes of each chunk."""
    sizes = [(shard.name, shard.numel) for shard in shards]
    chunks = chunk_pieces(sizes, chunk_count, row_places(shards))
    kinds = {shard.name: shard.param.kind for shard in shards}
    return chunks, payload_sizes(chunks, lambda name: format_of(compression, kinds[name]))


def _largest_unit(chunks: Sequence[Sequence[Piece]]) -> int:
    """Return the values of the largest unit, which is encoded at once."""
    return max((piece.unit.numel for pieces in chunks for piece in pieces), default=0)
