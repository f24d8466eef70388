"""Shards <-> whole matrices at their owners: one all-to-all each way over a stage group.

::

    collect   momentum shards --pack--> shard side --all-to-all--> owner side --assemble--> matrices
    return_   update shards <--unpack-- shard side <--all-to-all-- owner side <--flatten--- matrices

Both buffers are allocated once. Every rank enters both collectives in every step, also one that
holds no element or owns no unit: a rank cannot know from its own shards whether others are waiting.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from megatron_muloco.errors import RuntimeMismatch
from megatron_muloco.optim.segments import RankShards, Segment, check_coverage, plan_paths
from megatron_muloco.optim.units import Unit
from megatron_muloco.shards import coverage

__all__ = ["ShardExchange", "Transport"]


class Transport(Protocol):
    """An all-to-all of flat buffers; see `megatron_muloco.comm.exchange.AllToAll`."""

    def __call__(
        self,
        received: Tensor,
        sent: Tensor,
        *,
        receive_splits: Sequence[int],
        send_splits: Sequence[int],
    ) -> None:
        """Send split i of ``sent`` to rank i and fill ``received`` in the order of ranks."""


class ShardExchange:
    """Moves a stage group's units between the ranks that hold pieces and the ranks that own them.

    Invariant: every element of every unit is held by exactly one rank of the group, and comes back
    to the place it was taken from.

    Attributes:
        units: All units, in an order that is the same on every rank.
        rank: This rank's place in the group.
        owned: The units that this rank owns.
        planned_bytes: Bytes that one collect and one return send to *other* ranks.
        bytes_sent: The same, counted over all calls so far.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        owners: Sequence[int],
        layout: Sequence[RankShards],
        *,
        rank: int,
        transport: Transport | None,
        wire_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Build the segment tables.

        Args:
            units: All units of the stage, in the same order on every rank.
            owners: Group rank of each unit's owner.
            layout: What each rank of the stage group holds, in group order.
            rank: This rank's place in the group.
            transport: The all-to-all; not needed by a group of one rank.
            wire_dtype: fp32 or bf16. A group of one rank rounds to it too, so that the result does
                not depend on the layout.
            device: Where shards and matrices are.

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
        self._transport = transport if len(layout) > 1 else None
        self._paths = plan_paths(self.units, owners, layout, rank)
        self._numel = self._shard_sizes(layout[rank])
        self._shard_side = torch.empty(
            sum(self._paths.shard_splits), dtype=wire_dtype, device=device
        )
        # With one rank nothing moves: both sides are the same elements in the same order.
        self._owner_side = (
            torch.empty(sum(self._paths.owner_splits), dtype=wire_dtype, device=device)
            if self._transport
            else self._shard_side
        )
        self._shard_views = _views(self._shard_side, self._paths.shard_segments)
        self._owner_views = _views(self._owner_side, self._paths.owner_segments)
        self.planned_bytes = self._paths.elements_sent(rank) * wire_dtype.itemsize
        self.bytes_sent = 0

    @property
    def shard_names(self) -> tuple[str, ...]:
        """The parameters of which this rank holds elements, in the order of the units."""
        return tuple(self._numel)

    def collect(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the whole matrices of the units that this rank owns.

        Args:
            shards: For each parameter of `shard_names`, this rank's flat piece of any quantity
                (momentum, pseudogradient, a moment to be saved).

        Returns:
            Unit name -> new contiguous fp32 matrix of the unit's full shape.

        Collectives: one all-to-all over the stage group; every rank of it must call.
        """
        self._check_names(shards, self._numel)
        for name, numel in self._numel.items():
            if shards[name].numel() != numel:
                raise RuntimeMismatch(
                    f"the shard of {name} has {shards[name].numel()} elements, planned were {numel}"
                )
        _copy_all(
            self._shard_views,
            self._shard_cuts(shards),
        )
        self._move(
            self._shard_side, self._paths.shard_splits, self._owner_side, self._paths.owner_splits
        )
        staged = {unit.name: self._empty(unit.numel) for unit in self.owned}
        _copy_all(self._owner_cuts(staged), self._owner_views)
        return {unit.name: _assemble(staged[unit.name], unit) for unit in self.owned}

    def return_(self, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's flat pieces of matrices that their owners give.

        Args:
            matrices: Exactly the units of `owned`, each with its full shape.

        Returns:
            Parameter name -> new flat fp32 tensor, for each parameter of `shard_names`.

        Collectives: one all-to-all over the stage group; every rank of it must call.
        """
        self._check_names(matrices, [unit.name for unit in self.owned])
        staged = {unit.name: _flatten(matrices[unit.name], unit) for unit in self.owned}
        _copy_all(self._owner_views, self._owner_cuts(staged))
        self._move(
            self._owner_side, self._paths.owner_splits, self._shard_side, self._paths.shard_splits
        )
        pieces = {name: self._empty(numel) for name, numel in self._numel.items()}
        _copy_all(
            self._shard_cuts(pieces),
            self._shard_views,
        )
        return pieces

    def _owner_cuts(self, staged: Mapping[str, Tensor]) -> list[Tensor]:
        segments = self._paths.owner_segments
        return [_cut(staged[s.unit.name], s.unit_offset, s.length) for s in segments]

    def _shard_cuts(self, shards: Mapping[str, Tensor]) -> list[Tensor]:
        segments = self._paths.shard_segments
        return [_cut(shards[s.unit.param], s.shard_offset, s.length) for s in segments]

    def _empty(self, numel: int) -> Tensor:
        return torch.empty(numel, dtype=torch.float32, device=self._shard_side.device)

    def _move(
        self, sent: Tensor, send_splits: Sequence[int], received: Tensor, splits: Sequence[int]
    ) -> None:
        """Enter one all-to-all, whatever this rank has; count what leaves it."""
        if self._transport is None:
            return
        self._transport(received, sent, receive_splits=splits, send_splits=send_splits)
        self.bytes_sent += (sent.numel() - send_splits[self.rank]) * sent.element_size()

    def _shard_sizes(self, shards: RankShards) -> dict[str, int]:
        """Return the sizes of this rank's shards; raise unless units contain all of them."""
        found: dict[str, int] = {}
        for segment in self._paths.shard_segments:
            name = segment.unit.param
            found[name] = found.get(name, 0) + segment.length
        sizes = {
            unit.param: end - start
            for unit in self.units
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

    @staticmethod
    def _check_names(
        given: Mapping[str, Tensor], wanted: Mapping[str, int] | Sequence[str]
    ) -> None:
        missing, surplus = coverage(list(given), wanted)
        if missing or surplus:
            raise RuntimeMismatch(
                f"the exchange was planned for other tensors: missing {missing}, unknown {surplus}"
            )


def _cut(flat: Tensor, offset: int, length: int) -> Tensor:
    return flat.view(-1)[offset : offset + length]


def _views(buffer: Tensor, segments: Sequence[Segment]) -> list[Tensor]:
    """Return the consecutive pieces of ``buffer`` that carry the segments."""
    return list(buffer.split([segment.length for segment in segments])) if segments else []


def _copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    if targets:  # the foreach functions refuse empty lists
        torch._foreach_copy_(list(targets), list(sources))


def _assemble(staged: Tensor, unit: Unit) -> Tensor:
    """Return the matrix of a unit staged as ``[tensor rank][local row][local column]``."""
    if unit.partition_dim == 0:
        return staged.view(unit.shape)
    blocks = staged.view(unit.tensor_size, *unit.local_shape)
    return blocks.transpose(0, 1).reshape(unit.shape)


def _flatten(matrix: Tensor, unit: Unit) -> Tensor:
    """Return the staged form of a whole matrix; undoes `_assemble`."""
    if tuple(matrix.shape) != unit.shape:
        raise RuntimeMismatch(f"{unit.name} has shape {unit.shape}, not {tuple(matrix.shape)}")
    if unit.partition_dim == 0:
        return matrix.reshape(-1)
    rows, columns = unit.local_shape
    return matrix.reshape(rows, unit.tensor_size, columns).transpose(0, 1).reshape(-1)
