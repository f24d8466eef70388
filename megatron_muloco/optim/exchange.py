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

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from megatron_muloco.errors import RuntimeMismatch
from megatron_muloco.optim.chunks import divide, largest_batch
from megatron_muloco.optim.lane import Lane, Transport
from megatron_muloco.optim.phase_timer import PhaseTimer
from megatron_muloco.optim.segments import RankShards, check_coverage, unit_segments
from megatron_muloco.optim.units import Unit
from megatron_muloco.shards import coverage

__all__ = ["ShardExchange", "Transform", "Transport"]

Transform = Callable[[tuple[Unit, ...], Tensor], Tensor]
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
        units: Sequence[Unit],
        owners: Sequence[int],
        layout: Sequence[RankShards],
        *,
        rank: int,
        transport: Transport | None,
        wire_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        chunks: int = 1,
    ) -> None:
        """Build the segment tables and allocate all memory.

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
        self._lanes = [
            Lane(
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
        self.planned_bytes = sum(lane.planned_bytes for lane in self._lanes)

    @property
    def shard_names(self) -> tuple[str, ...]:
        """The parameters of which this rank holds elements, in the order of the units."""
        return tuple(self._numel)

    @property
    def chunks(self) -> int:
        """In how many chunks units travel."""
        return len(self._lanes)

    @property
    def bytes_sent(self) -> int:
        """Bytes sent to other ranks over all calls so far."""
        return sum(lane.bytes_sent for lane in self._lanes)

    @property
    def buffer_bytes(self) -> int:
        """Bytes that this rank keeps between steps."""
        own = sum(piece.nbytes for piece in self._pieces.values()) + self._scratch.nbytes
        return own + sum(lane.buffer_bytes for lane in self._lanes)

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
            for lane in self._lanes:
                lane.start_collect(shards)
        for lane in self._lanes:
            with timer.phase("collect"):
                lane.wait()
            for batch in lane.batches:
                with timer.phase("collect"):
                    matrices = lane.assemble(batch)
                updates = function(batch.units, matrices)
                with timer.phase("return"):
                    lane.cut(batch, updates)
            with timer.phase("return"):
                lane.start_return()
        with timer.phase("return"):
            for lane in self._lanes:
                lane.wait()
                lane.unpack()
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


def _shard_sizes(units: Sequence[Unit], shards: RankShards) -> dict[str, int]:
    """Return the sizes of a rank's shards; raise unless the units contain all of them."""
    found: dict[str, int] = {}
    for unit in units:
        for segment in unit_segments(unit, shards):
            found[unit.param] = found.get(unit.param, 0) + segment.length
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
