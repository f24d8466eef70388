"""One chunk of the exchange: its buffers, its two all-to-alls, and its matrices by shape.

::

    collect   shards --pack--> shard side --all-to-all--> owner side --assemble--> batches
    return    pieces <--unpack-- shard side <--all-to-all-- owner side <--cut------ batches

A group of one rank has neither side: batches are assembled from the shards and cut into the pieces.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_muloco.optim.chunks import by_shape
from megatron_muloco.optim.segments import Block, RankShards, Segment, blocks, plan_paths
from megatron_muloco.optim.units import Unit

__all__ = ["Batch", "Lane", "Pending", "Transport"]


class Pending(Protocol):
    """A collective under way."""

    def wait(self) -> object:
        """Return when the buffers may be used."""


class Transport(Protocol):
    """An all-to-all of flat buffers; see `megatron_muloco.comm.exchange.AllToAll`."""

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

    units: tuple[Unit, ...]
    matrices: Tensor
    places: tuple[tuple[Segment, Block], ...]
    cells: tuple[Tensor, ...]
    runs: tuple[Tensor, ...]


class Lane:
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
        units: Sequence[Unit],
        owners: Sequence[int],
        layout: Sequence[RankShards],
        *,
        rank: int,
        transport: Transport | None,
        scratch: Tensor,
        pieces: Mapping[str, Tensor],
    ) -> None:
        self._transport, self._rank = transport, rank
        self._paths = paths = plan_paths(units, owners, layout, rank)
        self._pending: Pending | None = None
        self._shards: Mapping[str, Tensor] = {}
        self._pieces = _shard_runs(pieces, paths.shard_segments)
        sizes = (sum(paths.shard_splits), sum(paths.owner_splits)) if transport else (0, 0)
        self._shard_side, self._owner_side = map(scratch.new_empty, sizes)
        self._shard_views: list[Tensor] = []
        moved = self._pieces
        if transport is not None:
            self._shard_views = _consecutive(self._shard_side, paths.shard_segments)
            moved = _consecutive(self._owner_side, paths.owner_segments)
        owned = [unit for unit, owner in zip(units, owners, strict=True) if owner == rank]
        runs = dict(zip(paths.owner_segments, moved, strict=True))
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
        _copy_all(self._shard_views, _shard_runs(shards, self._paths.shard_segments))
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


def _batch(units: Sequence[Unit], runs: Mapping[Segment, Tensor], scratch: Tensor) -> Batch:
    """Return the views of a batch at the beginning of the scratch memory."""
    shape = (len(units), *units[0].shape)
    matrices = scratch[: math.prod(shape)].view(shape)
    index = {unit.name: i for i, unit in enumerate(units)}
    placed = [
        (segment, block, run[block.start : block.start + math.prod(block.shape)].view(block.shape))
        for segment, run in runs.items()
        if segment.unit.name in index
        for block in blocks(segment)
    ]
    return Batch(
        units=tuple(units),
        matrices=matrices,
        places=tuple((segment, block) for segment, block, _ in placed),
        cells=tuple(
            matrices[index[segment.unit.name], slice(*block.rows), slice(*block.columns)]
            for segment, block, _ in placed
        ),
        runs=tuple(run for _, _, run in placed),
    )


def _consecutive(buffer: Tensor, segments: Sequence[Segment]) -> list[Tensor]:
    """Return the consecutive runs of ``buffer`` that carry the segments."""
    return list(buffer.split([segment.length for segment in segments])) if segments else []


def _shard_runs(shards: Mapping[str, Tensor], segments: Sequence[Segment]) -> list[Tensor]:
    """Return the runs of the shards that the segments describe."""
    return [
        shards[s.unit.param].view(-1)[s.shard_offset : s.shard_offset + s.length] for s in segments
    ]


def _place_runs(shards: Mapping[str, Tensor], batch: Batch) -> list[Tensor]:
    """Return the elements of the shards that belong into the cells of a batch."""
    runs = _shard_runs(shards, [segment for segment, _ in batch.places])
    return [
        run[block.start : block.start + math.prod(block.shape)].view(block.shape)
        for run, (_, block) in zip(runs, batch.places, strict=True)
    ]


def _copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    if targets:  # the foreach functions refuse empty lists
        torch._foreach_copy_(list(targets), list(sources))
