"""Where the elements of a unit are: contiguous runs between rank shards and whole matrices.

A rank holds a flat range of its tensor-parallel piece of a parameter, cut anywhere. A unit at its
owner is staged as ``[tensor rank][local row][local column]``, so that a run of whole local rows is
contiguous on both sides for either partition dimension::

    shard of rank r      ....[a......b).......      flat, offsets from the shard's start
    unit, staged         [tp 0 ..........][tp 1 ....[a'.....b')...]

No torch here: the planner counts bytes with the same tables that move them.
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
    "largest_batch",
    "matrix_routes",
    "plan_routes",
    "rectangles",
]


@dataclass(frozen=True, slots=True)
class RankShards:
    """What one rank of a stage group holds.

    Attributes:
        tensor_rank: Its tensor-parallel rank.
        ranges: Name of each parameter it holds a piece of, and the flat range ``[start, end)`` of
            the local tensor. Vector parameters may be present; they are ignored.
    """

    tensor_rank: int
    ranges: Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class RangeRoute:
    """``length`` elements contiguous in a shard at one offset and in a staged unit at another."""

    unit: MuonMatrix
    shard_offset: int
    unit_offset: int
    length: int


@dataclass(frozen=True, slots=True)
class RoutingPlan:
    """Where a rank's elements go and where its units come from, in the order of the buffers.

    When collecting, a rank packs ``shard_routes`` into one buffer, the all-to-all cuts it by
    ``shard_splits``, and what arrives, ``owner_splits`` from each rank, holds ``owner_routes``.
    Returning is the same backwards.

    Attributes:
        shard_routes: Pieces of this rank's shards, by owner, then in the order of units.
        shard_splits: Elements for each owner.
        owner_routes: Pieces of this rank's units, by holder, then in the order of units.
        owner_splits: Elements from each holder.
    """

    shard_routes: tuple[RangeRoute, ...]
    shard_splits: tuple[int, ...]
    owner_routes: tuple[RangeRoute, ...]
    owner_splits: tuple[int, ...]

    def elements_sent(self, rank: int) -> int:
        """Return how many elements one collect and one return send to ranks other than this."""
        both = (self.shard_splits, self.owner_splits)
        return sum(sum(splits) - splits[rank] for splits in both)


def matrix_routes(unit: MuonMatrix, shards: RankShards) -> tuple[RangeRoute, ...]:
    """Return the runs of ``unit`` that a rank holds, in the order of both sides."""
    if unit.param not in shards.ranges:
        return ()
    start, end = shards.ranges[unit.param]
    columns = unit.local_columns
    staged = shards.tensor_rank * unit.local_shape[0] * columns
    found = []
    for first, last in unit.local_rows:
        low, high = max(start, first * columns), min(end, last * columns)
        if low < high:
            found.append(RangeRoute(unit, low - start, staged + low - first * columns, high - low))
        staged += (last - first) * columns
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Rectangle:
    """A rectangle of a whole matrix that a run of elements fills row by row.

    Attributes:
        start: First element of it within the run.
        rows: Rows ``[first, last)`` of the matrix.
        columns: Columns ``[first, last)`` of the matrix.
    """

    start: int
    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]


def rectangles(route: RangeRoute) -> tuple[Rectangle, ...]:
    """Return the rectangles that a route fills: a started row, whole local rows, a last row."""
    unit = route.unit
    rows, width = unit.local_shape
    piece, first = divmod(route.unit_offset, rows * width)
    top, left = (piece * rows, 0) if unit.partition_dim == 0 else (0, piece * width)
    found = []
    position, end = first, first + route.length
    while position < end:
        row, column = divmod(position, width)
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


def check_coverage(units: Sequence[MuonMatrix], layout: Sequence[RankShards]) -> None:
    """Raise unless every element of every unit is held by exactly one rank.

    Args:
        units: All units of the stage.
        layout: What each rank of the stage group holds, in group order.

    Raises:
        RuntimeMismatch: Some element has no holder or two of them.
    """
    for unit in units:
        runs = sorted(
            (route.unit_offset, route.length, rank)
            for rank, shards in enumerate(layout)
            for route in matrix_routes(unit, shards)
        )
        position = 0
        for offset, length, rank in runs:
            if offset != position:
                _refuse(unit, position, offset, rank)
            position += length
        if position != unit.numel:
            _refuse(unit, position, unit.numel, None)


def plan_routes(
    units: Sequence[MuonMatrix], owners: Sequence[int], layout: Sequence[RankShards], rank: int
) -> RoutingPlan:
    """Return the paths of one group rank; ``owners`` in the order of ``units``."""
    by_owner: list[list[MuonMatrix]] = [[] for _ in layout]
    for unit, owner in zip(units, owners, strict=True):
        by_owner[owner].append(unit)
    to_owner = [_routes_of(owned, layout[rank]) for owned in by_owner]
    from_holder = [_routes_of(by_owner[rank], shards) for shards in layout]
    return RoutingPlan(
        shard_routes=tuple(chain.from_iterable(to_owner)),
        shard_splits=tuple(sum(s.length for s in routes) for routes in to_owner),
        owner_routes=tuple(chain.from_iterable(from_holder)),
        owner_splits=tuple(sum(s.length for s in routes) for routes in from_holder),
    )


def _routes_of(units: Sequence[MuonMatrix], shards: RankShards) -> list[RangeRoute]:
    return [route for unit in units for route in matrix_routes(unit, shards)]


def _refuse(unit: MuonMatrix, position: int, found: int, rank: int | None) -> None:
    what = "is held twice" if found < position else "is held by no rank"
    where = "" if rank is None else f" (next piece: group rank {rank})"
    raise RuntimeMismatch(
        f"element {min(position, found)} of {unit.numel} of {unit.name} {what} of the stage "
        f"group{where}. Its update would be wrong on part of the matrix; the shards given do not "
        "describe this stage."
    )


# ------------------------------------------------------------------------------------------
# Which units travel together: chunks that can move while others are computed.
#
# Every owner's units are laid on a line, those of one shape side by side, and the line is cut into
# equal parts by elements. So each chunk gives each owner about the same share of its own work, and
# batches of one shape stay together where they can. No torch here; all ranks cut alike.


def divide(
    units: Sequence[MuonMatrix], owners: Sequence[int], chunks: int
) -> tuple[tuple[int, ...], ...]:
    """Return the indices of the units of each chunk, in order; chunks without units are left out.

    Args:
        units: All units of a stage.
        owners: Group rank of each unit's owner.
        chunks: How many chunks at most.
    """
    if chunks < 1:
        raise ValueError(f"an exchange needs at least one chunk, not {chunks}")
    members: list[list[int]] = [[] for _ in range(chunks)]
    for owner in sorted(set(owners)):
        owned = [index for index, other in enumerate(owners) if other == owner]
        total, before = sum(units[index].numel for index in owned), 0
        for index in sorted(owned, key=lambda i: (units[i].shape, units[i].blocks, i)):
            # By the middle of the unit, in integers: floor((before + numel / 2) / total * chunks).
            middle = 2 * before + units[index].numel
            members[middle * chunks // (2 * total)].append(index)
            before += units[index].numel
    return tuple(tuple(sorted(chunk)) for chunk in members if chunk)


def by_shape(units: Sequence[MuonMatrix]) -> list[list[MuonMatrix]]:
    """Return the units of each shape, which an owner computes together, in order.

    Units of one shape that are cut into other blocks are not of one kind.
    """
    batches: dict[tuple[tuple[int, int], int], list[MuonMatrix]] = {}
    for unit in units:
        batches.setdefault((unit.shape, unit.blocks), []).append(unit)
    return list(batches.values())


def largest_batch(units: Sequence[MuonMatrix]) -> int:
    """Return the elements of the largest batch that the units form by shape."""
    return max((sum(unit.numel for unit in batch) for batch in by_shape(units)), default=0)
