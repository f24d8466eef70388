"""`ShardExchange` gathers sharded matrices on their owners, applies a function, and scatters back.

Matrices travel in buckets. The collects of all buckets start at once; while the owner computes one
bucket, later buckets still arrive and earlier results are already on their way back::

    shards    pack all ->                                             -> unpack all
    network      [collect 0][collect 1][collect 2] [return 0] [return 1] [return 2]
    owner                   [compute 0]           [compute 1][compute 2]

One bucket moves elements as follows; in a group of one rank there are no buffers, and batches are
copied directly from the shards and into the pieces::

    collect   shards --pack--> shard side --all-to-all--> owner side --assemble--> batches
    return    pieces <-unpack- shard side <--all-to-all-- owner side <---cut------ batches

All memory is allocated once. Which elements go where is in `routing`; the function that is applied,
Newton-Schulz, is in `muon`.
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


Transform = Callable[[tuple[MuonMatrix, ...], Tensor], Tensor]
"""Maps matrices of one shape and their values ``[matrices, rows, columns]`` to new values."""


class Pending(Protocol):
    """A collective that has been started."""

    def wait(self) -> object:
        """Return when both buffers may be used again."""


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


class ShardExchange:
    """Moves the matrices of a stage group between the ranks that hold pieces and their owners.

    Invariant: exactly one rank of the group holds each element of each matrix, and it comes back to
    the place from which it was taken.

    Attributes:
        matrices: All matrices, in an order that is the same on every rank.
        rank: This rank's place in the group.
        owned: The matrices that this rank owns.
        planned_bytes: Bytes that one `transform` sends to *other* ranks.
    """

    def __init__(
        self,
        matrices: Sequence[MuonMatrix],
        owners: Sequence[int],
        layout: Sequence[RankShards],
        *,
        rank: int,
        transport: Transport | None,
        wire_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        buckets: int = 1,
    ) -> None:
        """Build the route tables and allocate all memory.

        Args:
            matrices: All matrices of the stage, in the same order on every rank.
            owners: Group rank of each matrix's owner.
            layout: What each rank of the stage group holds, in group order.
            rank: This rank's place in the group.
            transport: The all-to-all; not needed by a group of one rank.
            wire_dtype: fp32 or bf16. A group of one rank rounds to it too, so that the result does
                not depend on the layout.
            device: Device of shards and matrices.
            buckets: Largest number of buckets. A group of one rank has one bucket: nothing is sent,
                and smaller batches would only be slower.

        Raises:
            RuntimeMismatch: No rank or more than one holds some element, or several ranks have no
                transport.
        """
        if len(layout) > 1 and transport is None:
            raise RuntimeMismatch(f"a stage group of {len(layout)} ranks needs an all-to-all")
        if wire_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"matrices are sent as float32 or bfloat16, not {wire_dtype}")
        check_coverage(matrices, layout)
        self.matrices = tuple(matrices)
        self.owned = tuple(
            matrix for matrix, owner in zip(matrices, owners, strict=True) if owner == rank
        )
        self.rank = rank
        self._numel = _shard_sizes(self.matrices, layout[rank])
        # Not initialised: `_shard_sizes` has checked that the routes fill every element.
        self._pieces = {
            name: torch.empty(numel, dtype=torch.float32, device=device)
            for name, numel in self._numel.items()
        }
        divided = divide(matrices, owners, buckets if len(layout) > 1 else 1)
        # One scratch for all buckets: an owner computes one batch at a time, and `cut` has copied
        # its result out before the next batch is assembled.
        owned = [[matrices[i] for i in bucket if owners[i] == rank] for bucket in divided]
        scratch = torch.empty(
            max(map(largest_batch, owned), default=0), dtype=wire_dtype, device=device
        )
        self._scratch = scratch
        self._buckets = [
            ExchangeBucket(
                [matrices[i] for i in bucket],
                [owners[i] for i in bucket],
                layout,
                rank=rank,
                transport=transport if len(layout) > 1 else None,
                scratch=scratch,
                pieces=self._pieces,
            )
            for bucket in divided
        ]
        self.planned_bytes = sum(bucket.planned_bytes for bucket in self._buckets)

    @property
    def shard_names(self) -> tuple[str, ...]:
        """Parameters of which this rank holds elements, in the order of the matrices."""
        return tuple(self._numel)

    @property
    def bucket_count(self) -> int:
        """Number of buckets."""
        return len(self._buckets)

    @property
    def bytes_sent(self) -> int:
        """Bytes sent to other ranks over all calls so far."""
        return sum(bucket.bytes_sent for bucket in self._buckets)

    @property
    def buffer_bytes(self) -> int:
        """Bytes that this rank keeps allocated between steps."""
        own = sum(piece.nbytes for piece in self._pieces.values()) + self._scratch.nbytes
        return own + sum(bucket.buffer_bytes for bucket in self._buckets)

    def transform(
        self, shards: Mapping[str, Tensor], function: Transform, timer: PhaseTimer | None = None
    ) -> dict[str, Tensor]:
        """Apply ``function`` to every whole matrix on its owner; return this rank's pieces.

        Args:
            shards: For each parameter of `shard_names`, this rank's flat piece of any quantity;
                not modified.
            function: Called on the owner, once for each batch of a bucket. The values it gets have
                the wire dtype and are valid during the call only.
            timer: Gets the phases ``collect`` and ``return``: packing, unpacking and waiting.

        Returns:
            Parameter name -> flat fp32 tensor, for each parameter of `shard_names`; the next call
            overwrites these tensors.

        Collectives: two all-to-alls per bucket over the stage group, in all `planned_bytes` to
        other ranks. Every rank of the group must call.
        """
        self._check(shards)
        timer = timer or PhaseTimer()
        # Every rank enters both all-to-alls of every bucket, also one that holds no element or owns
        # no matrix: from its own shards it cannot know whether other ranks wait for it. All ranks
        # start them in one order (all collects, then the returns by bucket), which a communicator
        # requires.
        with timer.phase("collect"):
            for bucket in self._buckets:
                bucket.start_collect(shards)
        for bucket in self._buckets:
            with timer.phase("collect"):
                bucket.wait()
            for batch in bucket.batches:
                # Phases do not overlap: `function` times its own work between these two.
                with timer.phase("collect"):
                    stacked = bucket.assemble(batch)
                updates = function(batch.matrices, stacked)
                with timer.phase("return"):
                    bucket.cut(batch, updates)
            with timer.phase("return"):
                bucket.start_return()
        # Only now wait for returns, so that none of them delays the computation of a later bucket.
        # While one is unpacked, later ones still arrive.
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


def _shard_sizes(matrices: Sequence[MuonMatrix], shards: RankShards) -> dict[str, int]:
    """Return the sizes of a rank's shards; raise unless the matrices contain all of them."""
    found: dict[str, int] = {}
    for matrix in matrices:
        for route in matrix_routes(matrix, shards):
            found[matrix.param] = found.get(matrix.param, 0) + route.length
    sizes = {
        matrix.param: end - start
        for matrix in matrices
        if matrix.param in shards.ranges
        for start, end in [shards.ranges[matrix.param]]
        if start < end
    }
    short = sorted(name for name, size in sizes.items() if found.get(name, 0) != size)
    if short:
        raise RuntimeMismatch(
            f"the matrices contain only part of the shards of {short}; the rest would "
            "never be updated. Give all matrices of a parameter to one exchange."
        )
    return sizes


# ---- buckets ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Owned matrices of one shape, which are orthogonalised together.

    Attributes:
        matrices: The matrices.
        stacked: Their values, ``[matrices, rows, columns]``, in scratch memory that all batches of
            an exchange share.
        places: Source of each cell: the route and the rectangle of it.
        cells: Rectangular views of ``stacked`` that together contain every element once.
        runs: View of the buffer from which each cell is filled and into which its update is put. A
            group of one rank has no buffers: there these are views of the pieces, and cells are
            filled from the shards.
    """

    matrices: tuple[MuonMatrix, ...]
    stacked: Tensor
    places: tuple[tuple[RangeRoute, Rectangle], ...]
    cells: tuple[Tensor, ...]
    runs: tuple[Tensor, ...]


class ExchangeBucket:
    """Some matrices of the exchange with their communication buffers and their two all-to-alls.

    The calls of one step, in this order: `start_collect`, `wait`, for each batch `assemble` and
    `cut`, `start_return`, `wait`, `unpack`. The two all-to-alls use the same buffers in opposite
    directions, so neither buffer may be touched between a start and its `wait`.

    Attributes:
        batches: The matrices that this rank owns, by shape.
        planned_bytes: Bytes that one collect and one return send to *other* ranks.
        bytes_sent: Bytes sent to other ranks over all calls so far.

    Args:
        matrices: Matrices of the bucket, in the same order on every rank.
        owners: Group rank of each matrix's owner.
        layout: What each rank of the group holds.
        rank: This rank's place in the group.
        transport: The all-to-all; ``None`` in a group of one rank.
        scratch: Flat memory in the wire dtype with room for the `largest_batch` of the owned
            matrices.
        pieces: For each parameter of which this rank holds elements, the tensor that receives the
            updates.
    """

    def __init__(
        self,
        matrices: Sequence[MuonMatrix],
        owners: Sequence[int],
        layout: Sequence[RankShards],
        *,
        rank: int,
        transport: Transport | None,
        scratch: Tensor,
        pieces: Mapping[str, Tensor],
    ) -> None:
        self._transport, self._rank = transport, rank
        self._plan = plan = plan_routes(matrices, owners, layout, rank)
        self._pending: Pending | None = None
        self._shards: Mapping[str, Tensor] = {}
        self._pieces = _shard_runs(pieces, plan.shard_routes)
        sizes = (sum(plan.shard_splits), sum(plan.owner_splits)) if transport else (0, 0)
        # One pair of buffers serves both directions: once the batches are assembled, nothing that
        # the collect sent or delivered is read again.
        self._shard_side, self._owner_side = map(scratch.new_empty, sizes)
        self._shard_views: list[Tensor] = []
        # In a group of one rank both lists of routes are the same, so the views of the pieces are
        # the owner's runs.
        moved = self._pieces
        if transport is not None:
            self._shard_views = _consecutive(self._shard_side, plan.shard_routes)
            moved = _consecutive(self._owner_side, plan.owner_routes)
        owned = [matrix for matrix, owner in zip(matrices, owners, strict=True) if owner == rank]
        # A route identifies its run: no two ranks hold one element, so no two routes are equal.
        runs = dict(zip(plan.owner_routes, moved, strict=True))
        self.batches = tuple(_batch(batch, runs, scratch) for batch in by_shape(owned))
        self.planned_bytes = plan.elements_sent(rank) * scratch.element_size()
        self.bytes_sent = 0

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the two communication buffers."""
        return self._shard_side.nbytes + self._owner_side.nbytes

    def start_collect(self, shards: Mapping[str, Tensor]) -> None:
        """Pack this rank's elements and start sending them to their owners.

        In a group of one rank nothing is packed or sent: `assemble` reads ``shards`` directly.
        """
        if self._transport is None:
            self._shards = shards
            return
        # The shards are sliced in every call, unlike the buffer: with Nesterov they are new tensors
        # in every step. The copy rounds fp32 to the wire dtype.
        _copy_all(self._shard_views, _shard_runs(shards, self._plan.shard_routes))
        self._start(
            self._shard_side, self._plan.shard_splits, self._owner_side, self._plan.owner_splits
        )

    def start_return(self) -> None:
        """Start sending updates to the ranks that hold pieces; `cut` has filled the buffer."""
        self._shards = {}  # the caller's tensors are not kept alive between steps
        if self._transport is not None:
            self._start(
                self._owner_side,
                self._plan.owner_splits,
                self._shard_side,
                self._plan.shard_splits,
            )

    def wait(self) -> None:
        """Wait for the all-to-all that was started last, if any."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None

    def assemble(self, batch: Batch) -> Tensor:
        """Return the values of a batch, in scratch memory that the next batch overwrites."""
        # In a group of one rank this copy rounds to the wire dtype, as packing does in larger
        # groups, so that Newton-Schulz gets the same values in every layout.
        _copy_all(batch.cells, batch.runs if self._transport else _place_runs(self._shards, batch))
        return batch.stacked

    @staticmethod
    def cut(batch: Batch, updates: Tensor) -> None:
        """Round the updates of a batch to the wire dtype and copy them to the sending buffer."""
        # Through the scratch also in fp32: the cells are views of it, and ``updates`` may alias it.
        # This also rounds in a group of one rank, whose runs are the fp32 pieces.
        batch.stacked.copy_(updates)
        # Only into the runs of this batch: the buffer still holds the values of the bucket's later
        # batches.
        _copy_all(batch.runs, batch.cells)

    def unpack(self) -> None:
        """Copy the updates received into the pieces; in a group of one rank `cut` did so."""
        if self._transport is not None:
            _copy_all(self._pieces, self._shard_views)

    def _start(
        self,
        sent: Tensor,
        send_splits: Sequence[int],
        received: Tensor,
        receive_splits: Sequence[int],
    ) -> None:
        """Enter one all-to-all, also with nothing to send or receive, and count the bytes sent."""
        assert self._transport is not None, "a group of one rank starts nothing"
        self._pending = self._transport.start(
            received, sent, receive_splits=receive_splits, send_splits=send_splits
        )
        self.bytes_sent += (sent.numel() - send_splits[self._rank]) * sent.element_size()


def _batch(
    matrices: Sequence[MuonMatrix], runs: Mapping[RangeRoute, Tensor], scratch: Tensor
) -> Batch:
    """Return a batch whose values are at the beginning of the scratch memory."""
    shape = (len(matrices), *matrices[0].shape)
    stacked = scratch[: math.prod(shape)].view(shape)
    index = {matrix.name: i for i, matrix in enumerate(matrices)}
    placed = [
        (
            route,
            rectangle,
            run[rectangle.start : rectangle.start + math.prod(rectangle.shape)].view(
                rectangle.shape
            ),
        )
        for route, run in runs.items()
        if route.matrix.name in index
        for rectangle in rectangles(route)
    ]
    return Batch(
        matrices=tuple(matrices),
        stacked=stacked,
        places=tuple((route, rectangle) for route, rectangle, _ in placed),
        cells=tuple(
            stacked[index[route.matrix.name], slice(*rectangle.rows), slice(*rectangle.columns)]
            for route, rectangle, _ in placed
        ),
        runs=tuple(run for _, _, run in placed),
    )


def _consecutive(buffer: Tensor, routes: Sequence[RangeRoute]) -> list[Tensor]:
    """Return consecutive views of ``buffer``, one for each route."""
    return list(buffer.split([route.length for route in routes])) if routes else []


def _shard_runs(shards: Mapping[str, Tensor], routes: Sequence[RangeRoute]) -> list[Tensor]:
    """Return the views of the shards that the routes describe."""
    return [
        shards[route.matrix.param].view(-1)[route.shard_offset : route.shard_offset + route.length]
        for route in routes
    ]


def _place_runs(shards: Mapping[str, Tensor], batch: Batch) -> list[Tensor]:
    """Return the views of the shards that belong into the cells of a batch."""
    runs = _shard_runs(shards, [route for route, _ in batch.places])
    return [
        run[rectangle.start : rectangle.start + math.prod(rectangle.shape)].view(rectangle.shape)
        for run, (_, rectangle) in zip(runs, batch.places, strict=True)
    ]


def _copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    if targets:  # the foreach functions refuse empty lists
        torch._foreach_copy_(list(targets), list(sources))
