"""Which values the ranks of an outer group own: the fragment, laid end to end, cut into K chunks.

No torch. Chunk boundaries fall inside tensors. What a chunk has of a tensor is encoded by itself::

    tensors    |  a          |  b  |  c                  |
    chunks     |  0            |  1             |  2     |       K = 3
    pieces     |  a          |b|b  |  c         |  c     |
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_muloco.compress.format import CodingUnit, PayloadSize
from megatron_muloco.params import Shard

__all__ = [
    "Piece",
    "RowPlaces",
    "chunk_length",
    "chunk_pieces",
    "encoded_wire_bytes",
    "payload_sizes",
    "row_places",
    "uncoded_wire_bytes",
]

# Name -> width of its rows (0: all one row), and place of the shard's first value in the tensor.
RowPlaces = Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Piece:
    """The range ``[start, end)`` of a rank's flat tensor that lies in one chunk."""

    name: str
    start: int
    end: int
    unit: CodingUnit


def row_places(shards: Sequence[Shard]) -> dict[str, tuple[int, int]]:
    """Return where the rows of each shard's tensor begin; a vector is one row."""
    return {
        shard.name: (
            shard.param.local_shape[-1] if len(shard.param.local_shape) > 1 else 0,
            shard.start,
        )
        for shard in shards
    }


def chunk_length(sizes: Sequence[tuple[str, int]], chunk_count: int) -> int:
    """Return the values of every chunk but the last ones, which may have fewer."""
    return max(1, -(-sum(size for _, size in sizes) // chunk_count))


def chunk_pieces(
    sizes: Sequence[tuple[str, int]], chunk_count: int, rows: RowPlaces
) -> tuple[tuple[Piece, ...], ...]:
    """Return the pieces of each chunk; all but the last chunks have the same number of values.

    Args:
        sizes: Names and lengths of the rank's flat tensors in a fragment, in order.
        chunk_count: K, ranks of the outer group.
        rows: Rows of the tensors; a name that is missing has one row.
    """
    length = chunk_length(sizes, chunk_count)
    chunks: list[list[Piece]] = [[] for _ in range(chunk_count)]
    position = 0  # of the tensor in the fragment
    for name, size in sizes:
        width, first = rows.get(name, (0, 0))
        start = 0
        while start < size:
            index = (position + start) // length
            end = min(size, (index + 1) * length - position)
            offset = (first + start) % width if width else 0
            chunks[index].append(Piece(name, start, end, CodingUnit(end - start, width, offset)))
            start = end
        position += size
    return tuple(tuple(pieces) for pieces in chunks)


def payload_sizes(
    chunks: Sequence[Sequence[Piece]], size_of: Callable[[str], PayloadSize]
) -> list[int]:
    """Return the bytes of each chunk, encoded; ``size_of`` may be the codecs by name."""
    return [
        sum(size_of(each.name).payload_bytes(each.unit) for each in pieces) for pieces in chunks
    ]


def encoded_wire_bytes(sizes: Sequence[int], index: int, metadata_count: int) -> int:
    """Return the bytes that one rank sends for an encoded mean.

    Args:
        sizes: `payload_sizes` of the fragment.
        index: The rank's place in the outer group.
        metadata_count: fp32 numbers that travel along with its weight.
    """
    others = len(sizes) - 1
    return others * 4 * (1 + metadata_count) + sum(sizes) - sizes[index] + others * sizes[index]


def uncoded_wire_bytes(numel: int, num_replicas: int) -> int:
    """Return the bytes that one rank sends for an fp32 all-reduce of ``numel`` values."""
    return 2 * (num_replicas - 1) * -(-numel // num_replicas) * 4
