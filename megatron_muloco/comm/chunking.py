"""Division of a fragment into chunks, one for each rank of an outer group, and buffer lengths.

The tensors of a fragment are laid end to end and cut into K chunks of equal length. Boundaries fall
inside tensors. The part of one tensor in one chunk is a piece, and every piece is encoded by
itself::

    tensors    |  a          |  b  |  c                  |
    chunks     |  0            |  1             |  2     |       K = 3
    pieces     |  a          |b|b  |  c         |  c     |

Pure arithmetic without torch, because `comm.costs` counts bytes with the same functions.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_muloco.compress.format import CodingUnit, PayloadSize
from megatron_muloco.params import Shard

__all__ = [
    "Piece",
    "RowPlaces",
    "all_reduce_length",
    "chunk_length",
    "chunk_pieces",
    "even_chunk_length",
    "payload_ranges",
    "payload_sizes",
    "ring_bytes",
    "row_places",
    "two_way_bytes",
]

# Parameter name -> (row width of its local tensor, 0 for a vector; index of the shard's first value
# in that tensor).
RowPlaces = Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Piece:
    """The range ``[start, end)`` of a rank's flat tensor that lies in one chunk.

    Attributes:
        name: Name of the tensor.
        start: First value of the range.
        end: First value behind the range.
        unit: The range as a codec sees it.
    """

    name: str
    start: int
    end: int
    unit: CodingUnit


def row_places(shards: Sequence[Shard]) -> dict[str, tuple[int, int]]:
    """Return the row width and first index of each shard; a vector has row width 0."""
    return {
        shard.name: (
            shard.param.local_shape[-1] if len(shard.param.local_shape) > 1 else 0,
            shard.start,
        )
        for shard in shards
    }


def chunk_length(sizes: Sequence[tuple[str, int]], chunk_count: int) -> int:
    """Return the number of values in a full chunk; the last chunks may have fewer."""
    return max(1, -(-sum(size for _, size in sizes) // chunk_count))


def chunk_pieces(
    sizes: Sequence[tuple[str, int]], chunk_count: int, rows: RowPlaces
) -> tuple[tuple[Piece, ...], ...]:
    """Return the pieces of each chunk.

    Together the pieces cover every value of every tensor exactly once. All chunks have the same
    number of values, except that the last ones may have fewer or none.

    Args:
        sizes: Names and lengths of the rank's flat tensors in a fragment, in order.
        chunk_count: Number of chunks, K for a reduction that gives every rank one of them.
        rows: Rows of the tensors; a missing name means a tensor of one row.
    """
    length = chunk_length(sizes, chunk_count)
    chunks: list[list[Piece]] = [[] for _ in range(chunk_count)]
    position = 0  # where the tensor begins in the fragment
    for name, size in sizes:
        width, first = rows.get(name, (0, 0))
        start = 0
        while start < size:
            index = (position + start) // length
            end = min(size, (index + 1) * length - position)
            # A shard may begin inside a row of its tensor, and a piece inside a row of its shard.
            offset = (first + start) % width if width else 0
            chunks[index].append(Piece(name, start, end, CodingUnit(end - start, width, offset)))
            start = end
        position += size
    return tuple(tuple(pieces) for pieces in chunks)


def payload_sizes(
    chunks: Sequence[Sequence[Piece]], size_of: Callable[[str], PayloadSize]
) -> list[int]:
    """Return the encoded bytes of each chunk.

    Args:
        chunks: The pieces of each chunk.
        size_of: Returns the payload size rule of a parameter; a codec is one too.
    """
    return [
        sum(size_of(each.name).payload_bytes(each.unit) for each in pieces) for pieces in chunks
    ]


def payload_ranges(
    pieces: Sequence[Piece], size_of: Callable[[str], PayloadSize]
) -> Iterator[tuple[Piece, slice]]:
    """Yield every piece of a chunk with its byte range in the chunk's payload."""
    start = 0
    for piece in pieces:
        end = start + size_of(piece.name).payload_bytes(piece.unit)
        yield piece, slice(start, end)
        start = end


# ------------------------------------------------------------------------------------------
# Lengths of buffers, and bytes on the wire.


def all_reduce_length(numel: int, num_replicas: int, row: int) -> int:
    """Return the fp32 values in the buffer of `AllReduce`: tensors, K rows, padding to K."""
    return _round_up(numel + num_replicas * row, num_replicas)


def ring_bytes(numel: int, num_replicas: int) -> int:
    """Return the bytes that one rank sends for a ring all-reduce of ``numel`` fp32 values."""
    return 2 * (num_replicas - 1) * -(-numel // num_replicas) * 4


def even_chunk_length(numel: int, num_replicas: int) -> int:
    """Return the values in a chunk of `ChunkedAllReduce`, an even number.

    So the fp32 row of the next message stays aligned to 4 bytes behind bf16 values.
    """
    return _round_up(-(-numel // num_replicas), 2)


def two_way_bytes(sizes: Sequence[int], index: int, row: int) -> int:
    """Return the bytes that one rank sends for a `CompressedAllReduce`.

    First the row and the encoded chunk of each other rank, then this rank's own encoded mean to
    each of them.

    Args:
        sizes: Payload bytes of each chunk.
        index: The rank's place in the outer group.
        row: fp32 numbers of a row: weight and metadata.
    """
    others = len(sizes) - 1
    return others * 4 * row + sum(sizes) - sizes[index] + others * sizes[index]


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
