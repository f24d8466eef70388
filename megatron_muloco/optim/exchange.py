"""Whole matrices at their owners, for as long as it takes to change them: `ShardExchange`.

Units travel in chunks. All chunks set off at once; while one is orthogonalised, later ones are
still arriving and earlier ones are on their way back::

    shards   C0 C1 C2 ->                                    -> pieces
    wire        [C0][C1][C2]   [R0]   [R1]   [R2]
    owner            [ chunk 0 ][ chunk 1 ][ chunk 2 ]

All memory is allocated once. Every rank enters both all-to-alls of every chunk in every step, also
one that holds no element or owns no unit: a rank cannot know from its own shards whether others are
waiting.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_muloco.errors import RuntimeMismatch
from megatron_muloco.optim.matrices import MuonMatrix
from megatron_muloco.optim.phase_timer import PhaseTimer
from megatron_muloco.optim.routing import (
    RangeRoute,
    RankShards,
    Rectangle,
    by_shape,
    check_coverage,
    divide,
    largest_batch,
    matrix_routes,
    plan_routes,
    rectangles,
)
from megatron_muloco.params import coverage

__all__ = ["Batch", "ExchangeBucket", "Pending", "ShardExchange", "Transform", "Transport"]


# ------------------------------------------------------------------------------------------
# One chunk of the exchange: its buffers, its two all-to-alls, and its matrices by shape.
#
# ::
#
#     collect   shards --pack--> shard side --all-to-all--> owner side --assemble--> batches
#     return    pieces <--unpack-- shard side <--all-to-all-- owner side <--cut------ batches
#
# A group of one rank has neither side: batches are assembled from the shards and cut into the
# pieces.


class Pending(Protocol):
    """A collective under way."""

    def wait(self) -> object:
        """Return when the buffers may be used."""


class Transport(Protocol):
    """An all-to-all of flat buffers; see `megatron_muloco.comm.collectives.AllToAll`."""

    def start(
        self,
        received: Tensor,
        sent: Tensor,
        *,
        receive_splits: Sequence[int],
        send_splits: Sequence[int],
    ) -> Pending:
        """Start sending split i of ``sent`` to rank i and filling ``received`` by rank."""


@dataclass(frozen=True)
class Batch:
    """Owned units of one shape, orthogonalised together.

    Attributes:
        units: In the order of the batch.
        matrices: ``[units, rows, columns]``, in memory that all batches of an exchange share.
        places: The elements that each cell has, in the shards that they are from.
        cells: Rectangles of ``matrices``; together all of them.
        runs: Where each cell's elements arrive (in a group of one rank: not) and leave from.
    """

    units: tuple[MuonMatrix, ...]
    matrices: Tensor
    places: tuple[tuple[RangeRoute, Rectangle], ...]
    cells: tuple[Tensor, ...]
    runs: tuple[Tensor, ...]


class ExchangeBucket:
    """Moves one chunk of units between the ranks that hold pieces and the ranks that own them.

    Attributes:
        batches: The units that this rank owns, by shape.
        planned_bytes: Bytes that one collect and one return send to *other* ranks.
        bytes_sent: The same, counted over all calls so far.

    Args:
        units: Of the chunk, in the same order on every rank.
        owners: Group rank of each unit's owner.
        layout: What each rank of the group holds.
        rank: This rank's place in the group.
        transport: The all-to-all; ``None`` in a group of one rank.
        scratch: Flat memory in the dtype of the wire, for the `largest_batch` of the owned units.
        pieces: For each parameter of which this rank holds elements, where updates come back to.
    """

    def __init__(
        self,
        units: Sequence[MuonMatrix],
        owners: Sequence[int],
        layout: Sequence[RankShards],
        *,
        rank: int,
        transport: Transport | None,
        scratch: Tensor,
        pieces: Mapping[str, Tensor],
    ) -> None:
        self._transport, self._rank = transport, rank
        self._paths = paths = plan_routes(units, owners, layout, rank)
        self._pending: Pending | None = None
        self._shards: Mapping[str, Tensor] = {}
        self._pieces = _shard_runs(pieces, paths.shard_routes)
        sizes = (sum(paths.shard_splits), sum(paths.owner_splits)) if transport else (0, 0)
        self._shard_side, self._owner_side = map(scratch.new_empty, sizes)
        self._shard_views: list[Tensor] = []
        moved = self._pieces
        if transport is not None:
            self._shard_views = _consecutive(self._shard_side, paths.shard_routes)
            moved = _consecutive(self._owner_side, paths.owner_routes)
        owned = [unit for unit, owner in zip(units, owners, strict=True) if owner == rank]
        runs = dict(zip(paths.owner_routes, moved, strict=True))
        self.batches = tuple(_batch(batch, runs, scratch) for batch in by_shape(owned))
        self.planned_bytes = paths.elements_sent(rank) * scratch.element_size()
        self.bytes_sent = 0

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the buffers that the all-to-alls read and write."""
        return self._shard_side.nbytes + self._owner_side.nbytes

    def start_collect(self, shards: Mapping[str, Tensor]) -> None:
        """Pack this rank's elements and start sending them to their owners.

        In a group of one rank nothing is packed or sent: `assemble` reads ``shards`` themselves.
        """
        if self._transport is None:
            self._shards = shards
            return
        _copy_all(self._shard_views, _shard_runs(shards, self._paths.shard_routes))
        self._start(
            self._shard_side, self._paths.shard_splits, self._owner_side, self._paths.owner_splits
        )

    def start_return(self) -> None:
        """Start sending updates, `cut` from all batches before, to the ranks that hold pieces."""
        self._shards = {}
        if self._transport is not None:
            self._start(
                self._owner_side,
                self._paths.owner_splits,
                self._shard_side,
                self._paths.shard_splits,
            )

    def wait(self) -> None:
        """Wait for what was started last."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None

    def assemble(self, batch: Batch) -> Tensor:
        """Return the matrices of a batch, in memory that the next batch overwrites."""
        _copy_all(batch.cells, batch.runs if self._transport else _place_runs(self._shards, batch))
        return batch.matrices

    @staticmethod
    def cut(batch: Batch, updates: Tensor) -> None:
        """Round the updates of a batch to the dtype of the wire and put them where they leave."""
        batch.matrices.copy_(updates)
        _copy_all(batch.runs, batch.cells)

    def unpack(self) -> None:
        """Put what came back into the pieces, where `cut` has not done so already."""
        if self._transport is not None:
            _copy_all(self._pieces, self._shard_views)

    def _start(
        self,
        sent: Tensor,
        send_splits: Sequence[int],
        received: Tensor,
        receive_splits: Sequence[int],
    ) -> None:
        """Enter one all-to-all, whatever this rank has; count what leaves it."""
        assert self._transport is not None, "a group of one rank starts nothing"
        self._pending = self._transport.start(
            received, sent, receive_splits=receive_splits, send_splits=send_splits
        )
        self.bytes_sent += (sent.numel() - send_splits[self._rank]) * sent.element_size()


def _batch(
    units: Sequence[MuonMatrix], runs: Mapping[RangeRoute, Tensor], scratch: Tensor
) -> Batch:
    """Return the views of a batch at the beginning of the scratch memory."""
    shape = (len(units), *units[0].shape)
    matrices = scratch[: math.prod(shape)].view(shape)
    index = {unit.name: i for i, unit in enumerate(units)}
    placed = [
        (
            route,
            rectangle,
            run[rectangle.start : rectangle.start + math.prod(rectangle.shape)].view(
                rectangle.shape
            ),
        )
        for route, run in runs.items()
        if route.unit.name in index
        for rectangle in rectangles(route)
    ]
    return Batch(
        units=tuple(units),
        matrices=matrices,
        places=tuple((route, rectangle) for route, rectangle, _ in placed),
        cells=tuple(
            matrices[index[route.unit.name], slice(*rectangle.rows), slice(*rectangle.columns)]
            for route, rectangle, _ in placed
        ),
        runs=tuple(run for _, _, run in placed),
    )


def _consecutive(buffer: Tensor, routes: Sequence[RangeRoute]) -> list[Tensor]:
    """Return the consecutive runs of ``buffer`` that carry the routes."""
    return list(buffer.split([route.length for route in routes])) if routes else []


def _shard_runs(shards: Mapping[str, Tensor], routes: Sequence[RangeRoute]) -> list[Tensor]:
    """Return the runs of the shards that the routes describe."""
    return [
        shards[s.unit.param].view(-1)[s.shard_offset : s.shard_offset + s.length] for s in routes
    ]


def _place_runs(shards: Mapping[str, Tensor], batch: Batch) -> list[Tensor]:
    """Return the elements of the shards that belong into the cells of a batch."""
    runs = _shard_runs(shards, [route for route, _ in batch.places])
    return [
        run[rectangle.start : rectangle.start + math.prod(rectangle.shape)].view(rectangle.shape)
        for run, (_, rectangle) in zip(runs, batch.places, strict=True)
    ]


def _copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    if targets:  # the foreach functions refuse empty lists
        torch._foreach_copy_(list(targets), list(sources))


# ------------------------------------------------------------------------------------------

Transform = Callable[[tuple[MuonMatrix, ...], Tensor], Tensor]
"""Maps units of one shape and their matrices ``[units, rows, columns]`` to matrices like them."""


class ShardExchange:
    """Moves a stage group's units between the ranks that hold pieces and the ranks that own them.

    Invariant: every element of every unit is held by exactly one rank of the group, and comes back
    to the place it was taken from.

    Attributes:
        units: All units, in an order that is the same on every rank.
        rank: This rank's place in the group.
        owned: The units that this rank owns.
        planned_bytes: Bytes that one `transform` sends to *other* ranks.
    """

    def __init__(
        self,
        units: Sequence[MuonMatrix],
        owners: Sequence[int],
        layout: Sequence[RankShards],
        *,
        rank: int,
        transport: Transport | None,
        wire_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        chunks: int = 1,
    ) -> None:
        """Build the route tables and allocate all memory.

        Args:
            units: All units of the stage, in the same order on every rank.
            owners: Group rank of each unit's owner.
            layout: What each rank of the stage group holds, in group order.
            rank: This rank's place in the group.
            transport: The all-to-all; not needed by a group of one rank.
            wire_dtype: fp32 or bf16. A group of one rank rounds to it too, so that the result does
                not depend on the layout.
            device: Where shards and matrices are.
            chunks: In how many chunks at most units travel; one in a group of one rank, where
                nothing travels and smaller batches would only be slower.

        Raises:
            RuntimeMismatch: Some element is held by no rank or by two, or there is no transport.
        """
        if len(layout) > 1 and transport is None:
            raise RuntimeMismatch(f"a stage group of {len(layout)} ranks needs an all-to-all")
        if wire_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"units travel as float32 or bfloat16, not {wire_dtype}")
        check_coverage(units, layout)
        self.units = tuple(units)
        self.owned = tuple(unit for unit, owner in zip(units, owners, strict=True) if owner == rank)
        self.rank = rank
        self._numel = _shard_sizes(self.units, layout[rank])
        self._pieces = {
            name: torch.empty(numel, dtype=torch.float32, device=device)
            for name, numel in self._numel.items()
        }
        divided = divide(units, owners, chunks if len(layout) > 1 else 1)
        members = [[units[i] for i in chunk] for chunk in divided]
        # One chunk is computed at a time, and of it one batch.
        own = [[units[i] for i in chunk if owners[i] == rank] for chunk in divided]
        scratch = torch.empty(
            max(map(largest_batch, own), default=0), dtype=wire_dtype, device=device
        )
        self._scratch = scratch
        self._buckets = [
            ExchangeBucket(
                chunk,
                [owners[i] for i in indices],
                layout,
                rank=rank,
                transport=transport if len(layout) > 1 else None,
                scratch=scratch,
                pieces=self._pieces,
            )
            for chunk, indices in zip(members, divided, strict=True)
        ]
        self.planned_bytes = sum(bucket.planned_bytes for bucket in self._buckets)

    @property
    def shard_names(self) -> tuple[str, ...]:
        """The parameters of which this rank holds elements, in the order of the units."""
        return tuple(self._numel)

    @property
    def chunks(self) -> int:
        """In how many chunks units travel."""
        return len(self._buckets)

    @property
    def bytes_sent(self) -> int:
        """Bytes sent to other ranks over all calls so far."""
        return sum(bucket.bytes_sent for bucket in self._buckets)

    @property
    def buffer_bytes(self) -> int:
        """Bytes that this rank keeps between steps."""
        own = sum(piece.nbytes for piece in self._pieces.values()) + self._scratch.nbytes
        return own + sum(bucket.buffer_bytes for bucket in self._buckets)

    def transform(
        self, shards: Mapping[str, Tensor], function: Transform, timer: PhaseTimer | None = None
    ) -> dict[str, Tensor]:
        """Apply ``function`` to every whole unit at its owner; return this rank's pieces of it.

        Args:
            shards: For each parameter of `shard_names`, this rank's flat piece of any quantity;
                not modified.
            function: Called at the owner, once for each shape of a chunk. Its matrices have the
                dtype of the wire, and the next call overwrites them.
            timer: Gets the phases ``collect`` and ``return``: packing, unpacking and waiting.

        Returns:
            Parameter name -> flat fp32 tensor, for each parameter of `shard_names`; overwritten by
            the next call.

        Collectives: two all-to-alls a chunk over the stage group; every rank of it must call.
        """
        self._check(shards)
        timer = timer or PhaseTimer()
        with timer.phase("collect"):
            for bucket in self._buckets:
                bucket.start_collect(shards)
        for bucket in self._buckets:
            with timer.phase("collect"):
                bucket.wait()
            for batch in bucket.batches:
                with timer.phase("collect"):
                    matrices = bucket.assemble(batch)
                updates = function(batch.units, matrices)
                with timer.phase("return"):
                    bucket.cut(batch, updates)
            with timer.phase("return"):
                bucket.start_return()
        with timer.phase("return"):
            for bucket in self._buckets:
                bucket.wait()
                bucket.unpack()
        return self._pieces

    def _check(self, shards: Mapping[str, Tensor]) -> None:
        """Raise unless these are the shards that were planned for."""
        missing, surplus = coverage(list(shards), self._numel)
        if missing or surplus:
            raise RuntimeMismatch(
                f"the exchange was planned for other tensors: missing {missing}, unknown {surplus}"
            )
        for name, numel in self._numel.items():
            if shards[name].numel() != numel:
                raise RuntimeMismatch(
                    f"the shard of {name} has {shards[name].numel()} elements, planned were {numel}"
                )


def _shard_sizes(units: Sequence[MuonMatrix], shards: RankShards) -> dict[str, int]:
    """Return the sizes of a rank's shards; raise unless the units contain all of them."""
    found: dict[str, int] = {}
    for unit in units:
        for route in matrix_routes(unit, shards):
            found[unit.param] = found.get(unit.param, 0) + route.length
    sizes = {
        unit.param: end - start
        for unit in units
        if unit.param in shards.ranges
        for start, end in [shards.ranges[unit.param]]
        if start < end
    }
    short = sorted(name for name, size in sizes.items() if found.get(name, 0) != size)
    if short:
        raise RuntimeMismatch(
            f"the units contain only part of the shards of {short}; the rest would "
            "never be updated. Give all units of a parameter to one exchange."
        )
    return sizes
