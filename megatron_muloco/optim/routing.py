"""Route tables of the exchange: which elements of a shard are which elements of a whole matrix.

A rank holds a flat range of its tensor-parallel piece of a parameter, cut anywhere. Its owner sees
the matrix in *staged order*, ``[tensor rank][local row][local column]``, so that a range of a shard
is contiguous in both for either partition dimension::

    shard of a rank      ....[a......b).......             flat, offsets from the shard's start
    matrix, staged       [tp 0 ..........][tp 1 ....[a'.....b')...]

A `RangeRoute` is one such range. `plan_routes` lists the routes of one rank in the order of its
communication buffers, `rectangles` maps a route into the matrix itself, and `divide` distributes
matrices over the buckets of the exchange. The module does not import torch: the planner counts
bytes with the tables that the exchange moves them by.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from megatron_muloco.errors import RuntimeMismatch
from megatron_muloco.optim.matrices import MuonMatrix

__all__ = [
    "RangeRoute",
    "RankShards",
    "Rectangle",
    "RoutingPlan",
    "by_shape",
    "check_coverage",
    "divide",
    "exchange_buffer_bytes",
    "largest_batch",
    "matrix_routes",
    "plan_routes",
    "rectangles",
]


@dataclass(frozen=True, slots=True)
class RankShards:
    """What one rank of a stage group holds.

    Attributes:
        tensor_rank: Its place in the tensor-parallel group.
        ranges: Name of each parameter of which it holds a piece, and the flat range
            ``[start, end)`` of the local tensor. Vector parameters may be present; they are
            ignored.
    """

    tensor_rank: int
    ranges: Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class RangeRoute:
    """A range of elements that is contiguous in a shard and in a staged matrix.

    Attributes:
        matrix: The matrix.
        shard_offset: First element, counted from the start of the shard.
        matrix_offset: First element in the staged order of the matrix.
        length: Number of elements.
    """

    matrix: MuonMatrix
    shard_offset: int
    matrix_offset: int
    length: int


@dataclass(frozen=True, slots=True)
class RoutingPlan:
    """All routes of one rank, in the order of its communication buffers.

    Collecting, a rank packs ``shard_routes`` into one buffer, of which ``shard_splits`` elements go
    to each rank, and receives a buffer with ``owner_splits`` elements from each rank, which holds
    ``owner_routes``. Returning is the same backwards. Sender and receiver list the routes between
    them in the same order, so that no indices are sent.

    Attributes:
        shard_routes: Pieces of this rank's shards, by owner, then in the order of the matrices.
        shard_splits: Elements for each owner.
        owner_routes: Pieces of this rank's matrices, by sending rank, then in the order of the
            matrices.
        owner_splits: Elements from each sending rank.
    """

    shard_routes: tuple[RangeRoute, ...]
    shard_splits: tuple[int, ...]
    owner_routes: tuple[RangeRoute, ...]
    owner_splits: tuple[int, ...]

    def elements_sent(self, rank: int) -> int:
        """Return how many elements one collect and one return send to ranks other than ``rank``."""
        both = (self.shard_splits, self.owner_splits)
        return sum(sum(splits) - splits[rank] for splits in both)


def matrix_routes(matrix: MuonMatrix, shards: RankShards) -> tuple[RangeRoute, ...]:
    """Return the routes of one matrix from one rank, ascending in the shard and in the matrix."""
    if matrix.param not in shards.ranges:
        return ()
    start, end = shards.ranges[matrix.param]
    columns = matrix.local_columns
    # All tensor-parallel ranks hold pieces of one shape, so each begins at a multiple of its size.
    staged = shards.tensor_rank * matrix.local_shape[0] * columns
    found = []
    # Rows of one matrix may lie apart in the local tensor (the q of every query group) and are
    # adjacent in staged order, so each range of rows gives at most one route.
    for first, last in matrix.local_rows:
        low, high = max(start, first * columns), min(end, last * columns)
        if low < high:
            found.append(
                RangeRoute(matrix, low - start, staged + low - first * columns, high - low)
            )
        # Also past rows that this shard lacks, because other ranks hold them. Rows between two
        # ranges are other matrices of the parameter, such as k and v between two q, and are not
        # counted.
        staged += (last - first) * columns
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Rectangle:
    """A rectangle of a whole matrix that consecutive elements of a route fill row by row.

    Attributes:
        start: Its first element within the route.
        rows: Rows ``[first, last)`` of the matrix.
        columns: Columns ``[first, last)`` of the matrix.
    """

    start: int
    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and columns."""
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]


def rectangles(route: RangeRoute) -> tuple[Rectangle, ...]:
    """Return the at most three rectangles that a route fills.

    A route may begin and end inside a local row: it fills the rest of its first row, then whole
    local rows, then the beginning of its last row.
    """
    matrix = route.matrix
    rows, width = matrix.local_shape
    # One division for the whole route: a shard lies in one tensor rank's piece, so its routes do.
    piece, first = divmod(route.matrix_offset, rows * width)
    top, left = (piece * rows, 0) if matrix.partition_dim == 0 else (0, piece * width)
    found = []
    position, end = first, first + route.length
    while position < end:
        row, column = divmod(position, width)
        # Whole rows are taken together only from the start of a row: a started row must be finished
        # first. With columns split, a local row is only a part of a row of the matrix, so several
        # whole rows are a rectangle in it but no contiguous range.
        whole_rows = (end - position) // width if column == 0 else 0
        count = whole_rows * width or min(width - column, end - position)
        found.append(
            Rectangle(
                start=position - first,
                rows=(top + row, top + row + (whole_rows or 1)),
                columns=(left + column, left + column + (width if whole_rows else count)),
            )
        )
        position += count
    return tuple(found)


def check_coverage(matrices: Sequence[MuonMatrix], layout: Sequence[RankShards]) -> None:
    """Raise unless every element of every matrix is held by exactly one rank.

    Args:
        matrices: All matrices of the stage.
        layout: What each rank of the stage group holds, in group order.

    Raises:
        RuntimeMismatch: No rank holds some element, or two ranks do.
    """
    # Every rank checks the whole layout and not only its own part, so all ranks raise together and
    # none waits in a collective for a rank that has failed.
    for matrix in matrices:
        runs = sorted(
            (route.matrix_offset, route.length, rank)
            for rank, shards in enumerate(layout)
            for route in matrix_routes(matrix, shards)
        )
        position = 0
        for offset, length, rank in runs:
            if offset != position:
                _refuse(matrix, position, offset, rank)
            position += length
        if position != matrix.numel:
            _refuse(matrix, position, matrix.numel, None)


def plan_routes(
    matrices: Sequence[MuonMatrix], owners: Sequence[int], layout: Sequence[RankShards], rank: int
) -> RoutingPlan:
    """Return the routes of one group rank, from each rank's shards to each matrix's owner.

    Args:
        matrices: Matrices, in the same order on every rank.
        owners: Group rank of each matrix's owner.
        layout: What each rank of the stage group holds, in group order.
        rank: The group rank.
    """
    by_owner: list[list[MuonMatrix]] = [[] for _ in layout]
    for matrix, owner in zip(matrices, owners, strict=True):
        by_owner[owner].append(matrix)
    to_owner = [_routes_of(owned, layout[rank]) for owned in by_owner]
    # An all-to-all orders a buffer by rank alone. Within the part from rank r to owner o, both
    # sides list the routes of o's matrices from r's shards, in the order of the matrices. In
    # another order the sizes would still fit, and elements would land in wrong places.
    from_rank = [_routes_of(by_owner[rank], shards) for shards in layout]
    return RoutingPlan(
        shard_routes=tuple(chain.from_iterable(to_owner)),
        shard_splits=tuple(sum(route.length for route in routes) for routes in to_owner),
        owner_routes=tuple(chain.from_iterable(from_rank)),
        owner_splits=tuple(sum(route.length for route in routes) for routes in from_rank),
    )


def _routes_of(matrices: Sequence[MuonMatrix], shards: RankShards) -> list[RangeRoute]:
    return [route for matrix in matrices for route in matrix_routes(matrix, shards)]


def _refuse(matrix: MuonMatrix, position: int, found: int, rank: int | None) -> None:
    what = "is held twice" if found < position else "is held by no rank"
    where = "" if rank is None else f" (next piece: group rank {rank})"
    raise RuntimeMismatch(
        f"element {min(position, found)} of {matrix.numel} of {matrix.name} {what} of the stage "
        f"group{where}. Its update would be wrong on part of the matrix; the shards given do not "
        "describe this stage."
    )


# ---- buckets: matrices that are sent together ------------------------------------------------


def divide(
    matrices: Sequence[MuonMatrix], owners: Sequence[int], buckets: int
) -> tuple[tuple[int, ...], ...]:
    """Distribute the matrices of a stage over the buckets of the exchange.

    Each owner's matrices are put in a row, equal shapes next to each other, and the row is cut into
    ``buckets`` parts with about the same number of elements. So each bucket gives each owner about
    the same share of its own work, and batches of one shape mostly stay together. All ranks
    compute the same buckets.

    Args:
        matrices: All matrices of a stage.
        owners: Group rank of each matrix's owner.
        buckets: Largest number of buckets.

    Returns:
        For each bucket the indices of its matrices, ascending; buckets without matrices are left
        out.
    """
    if buckets < 1:
        raise ValueError(f"an exchange needs at least one bucket, not {buckets}")
    members: list[list[int]] = [[] for _ in range(buckets)]
    for owner in sorted(set(owners)):
        owned = [index for index, other in enumerate(owners) if other == owner]
        total, before = sum(matrices[index].numel for index in owned), 0
        for index in sorted(owned, key=lambda i: (matrices[i].shape, matrices[i].blocks, i)):
            # floor((before + numel / 2) / total * buckets), in integers: exact, so always less than
            # `buckets` and the same on every rank. By its middle and not its beginning: a large
            # matrix may begin at the very end of a part.
            middle = 2 * before + matrices[index].numel
            members[middle * buckets // (2 * total)].append(index)
            before += matrices[index].numel
    # Only buckets that are empty for all owners are dropped, so every rank drops the same ones and
    # starts the same number of all-to-alls.
    return tuple(tuple(sorted(bucket)) for bucket in members if bucket)


def by_shape(matrices: Sequence[MuonMatrix]) -> list[list[MuonMatrix]]:
    """Return the batches that an owner computes: matrices of one shape and number of blocks."""
    batches: dict[tuple[tuple[int, int], int], list[MuonMatrix]] = {}
    # The shape alone does not decide: with split heads a square q has the shape of proj, but is
    # computed in blocks, and all of a batch must have blocks of one shape.
    for matrix in matrices:
        batches.setdefault((matrix.shape, matrix.blocks), []).append(matrix)
    return list(batches.values())


def largest_batch(matrices: Sequence[MuonMatrix]) -> int:
    """Return the number of elements of the largest batch that `by_shape` forms."""
    return max((sum(matrix.numel for matrix in batch) for batch in by_shape(matrices)), default=0)


def exchange_buffer_bytes(
    matrices: Sequence[MuonMatrix],
    owners: Sequence[int],
    group_size: int,
    *,
    buckets: int,
    wire_bytes: int,
) -> int:
    """Return the bytes that `exchange.ShardExchange` keeps between steps on the fullest rank.

    A rank keeps updates in fp32 for each element that it holds, taken as an even share. In the
    dtype of the exchange it keeps what it sends (as many elements), what it receives as an owner
    (all elements of its matrices), and the largest batch of matrices that it computes at once. A
    group of one rank sends nothing.

    Args:
        matrices: All matrices of a stage.
        owners: Group rank of each matrix's owner.
        group_size: Number of ranks in the stage group.
        buckets: Largest number of buckets.
        wire_bytes: Bytes of a sent element.
    """
    held = -(-sum(matrix.numel for matrix in matrices) // group_size)
    if group_size == 1:
        return 4 * held + wire_bytes * largest_batch(matrices)
    divided = divide(matrices, owners, buckets)
    as_owner = 0
    for rank in range(group_size):
        owned = [[matrices[i] for i in bucket if owners[i] == rank] for bucket in divided]
        received = sum(matrix.numel for bucket in owned for matrix in bucket)
        as_owner = max(as_owner, received + max(map(largest_batch, owned), default=0))
    return (4 + wire_bytes) * held + wire_bytes * as_owner
