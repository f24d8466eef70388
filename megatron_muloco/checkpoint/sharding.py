"""`ModelSpace` turns the flat shards of data-parallel ranks into whole pieces, and back.

A checkpoint is stored in model space: it does not depend on how data parallelism cut the masters.
Each parameter of a pipeline stage has one *owner* among the dp x cp ranks. To save, the shards of a
parameter are sent to its owner, which writes the whole tensor-parallel piece. To load, the owner
reads the piece and sends the shards back. The owners divide the elements evenly, so no rank needs
memory for more than its share, and a replica writes and reads each element once::

    dp 0  [aaa|bb]        gather       owner of a: dp 0   [aaaaaa]
    dp 1  [aaa|bbbb]   ------------>   owner of b: dp 1   [bbbbbb]

`Cut` is the other half: where a tensor-parallel piece lies in the whole parameter. It is arithmetic
on shapes, and the digest uses it too.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from megatron_muloco.comm.agreement import gather_objects
from megatron_muloco.comm.collectives import AllToAll
from megatron_muloco.comm.groups import Groups
from megatron_muloco.params import ParamInfo, Shard

__all__ = ["Cut", "ModelSpace", "sharded_tensors"]

# Elements of the parameters that travel together: at most 256 MiB of fp32 each way at a rank.
_BATCH_NUMEL = 1 << 26


@dataclass(frozen=True, slots=True)
class Cut:
    """The place of one rank's tensor-parallel piece in the whole parameter.

    Megatron cuts a parameter along one dimension into equal slices, one per tensor-parallel rank.
    The fused MLP input is the exception: gate and up are cut separately, and every rank stacks its
    two slices::

        whole   | gate 0 | gate 1 | up 0 | up 1 |        rank 0 holds | gate 0 | up 0 |

    The fused q, k and v need no rule of their own: a rank holds whole query groups, and those are
    adjacent in the whole parameter.

    Attributes:
        param: The parameter as this rank holds it.
        tensor_rank: This rank's index among the tensor-parallel ranks.
        tensor_size: Number of tensor-parallel ranks.
    """

    param: ParamInfo
    tensor_rank: int
    tensor_size: int

    @property
    def dim(self) -> int:
        """Dimension that is cut; 0 for a replicated parameter."""
        return self.param.partition_dim or 0

    @property
    def slices(self) -> int:
        """Slices of each block; 1 for a replicated parameter."""
        return 1 if self.param.partition_dim is None else self.tensor_size

    @property
    def index(self) -> int:
        """Index of this rank's slice in each block."""
        return 0 if self.param.partition_dim is None else self.tensor_rank

    @property
    def blocks(self) -> int:
        """Number of blocks along ``dim`` that are cut separately; every rank stacks its slices."""
        return 2 if self.param.kind == "fc1" else 1

    @property
    def slice_length(self) -> int:
        """Length along ``dim`` of one slice of one block."""
        return self.param.local_shape[self.dim] // self.blocks


class ModelSpace:
    """Moves this rank's shards to the owners of their parameters, and back.

    Invariant: all dp x cp ranks know the same parameters, in the same order, with the same owners.

    Args:
        groups: This rank's groups.
        infos: Every parameter of this stage, in the order of the stage.
        shards: This rank's shards of them.
        device: The device that the group's backend sends from.

    Collectives: construction gathers every rank's ranges over dp x cp (one small object per rank).
    All ranks of that group call `names`, `gather` and `scatter` in the same order, with the same
    names.
    """

    def __init__(
        self,
        groups: Groups,
        infos: Mapping[str, ParamInfo],
        shards: Sequence[Shard],
        device: torch.device,
    ) -> None:
        self._group = groups.pg.dp_cp
        self._exchange = AllToAll(self._group)
        self._infos, self._device = infos, device
        self._topology, self._tensor_rank = groups.topology, groups.coords.tp
        mine = {shard.name: (shard.start, shard.end) for shard in shards}
        self._ranges: list[dict[str, tuple[int, int]]] = gather_objects(self._group, mine)
        self._owners = _assign_owners(infos, self._exchange.size)

    def cut(self, name: str) -> Cut:
        """Return the place of this rank's piece in the whole parameter."""
        return Cut(self._infos[name], self._tensor_rank, self._topology.tensor)

    def owns(self, name: str) -> bool:
        """Whether this rank is the parameter's owner: it reads and writes the whole piece."""
        return self._owners[name] == self._exchange.rank

    def names(self, kinds: Mapping[str, Collection[str]]) -> dict[str, list[str]]:
        """Return, for each kind of tensor, the names that any dp x cp rank has, in stage order.

        A rank without a shard of a parameter cannot know otherwise that other ranks have one.

        Collectives: one small object per rank over dp x cp; every rank of the group calls it.
        """
        mine = {kind: sorted(names) for kind, names in kinds.items()}
        everywhere = gather_objects(self._group, mine)
        return {
            kind: [name for name in self._infos if any(name in rank[kind] for rank in everywhere)]
            for kind in kinds
        }

    def gather(self, pieces: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """Return the whole pieces that this rank owns, in their local shape, in host memory.

        Args:
            pieces: This rank's flat fp32 shards, by name.
            names: Parameters to gather; the same on all ranks.

        Collectives: one all-to-all over dp x cp per batch of parameters, 4 bytes an element; every
        rank of the group calls it, also with no shard of any of ``names``.
        """
        whole: dict[str, Tensor] = {}
        # Batches bound the send and receive buffers. Every rank derives the same batches from the
        # same names, so the all-to-alls pair up although each rank sends other parameters.
        for batch in self._batches(names):
            leaving = [
                pieces[name].detach().view(-1).to(self._device) for name in self._sent(batch)
            ]
            # A rank may have no shard in this batch; torch.cat needs at least one tensor.
            empty = torch.empty(0, dtype=torch.float32, device=self._device)
            arrived = self._exchanged(
                torch.cat([empty, *leaving]),
                send_splits=self._sent_counts(batch),
                receive_splits=self._owned_counts(batch),
            )
            owned = {
                name: torch.empty(self._infos[name].numel, dtype=torch.float32)
                for name in filter(self.owns, batch)
            }
            for place, piece in self._owned_places(batch, owned, arrived):
                place.copy_(piece)
            whole.update(owned)
        return {name: tensor.view(self._infos[name].local_shape) for name, tensor in whole.items()}

    def scatter(self, whole: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """Return this rank's flat shards in host memory: the inverse of `gather`.

        Args:
            whole: The whole pieces that this rank owns, by name.
            names: Parameters to scatter; the same on all ranks.

        Collectives: as `gather`.
        """
        pieces: dict[str, Tensor] = {}
        for batch in self._batches(names):
            owned = {name: whole[name].reshape(-1) for name in filter(self.owns, batch)}
            leaving = torch.empty(sum(self._owned_counts(batch)), dtype=torch.float32)
            for place, piece in self._owned_places(batch, owned, leaving):
                piece.copy_(place)
            arrived = self._exchanged(
                leaving.to(self._device),
                send_splits=self._owned_counts(batch),
                receive_splits=self._sent_counts(batch),
            )
            # `gather` sent the shards in this order, grouped by owner, so they return in it.
            mine = self._sent(batch)
            lengths = [_length(self._own_ranges[name]) for name in mine]
            pieces.update(zip(mine, arrived.split(lengths), strict=True) if mine else ())
        return pieces

    # ---- layout of the buffers --------------------------------------------------------------

    @property
    def _own_ranges(self) -> dict[str, tuple[int, int]]:
        return self._ranges[self._exchange.rank]

    def _batches(self, names: Sequence[str]) -> Iterator[list[str]]:
        batch: list[str] = []
        for name in names:
            if batch and sum(self._infos[n].numel for n in (*batch, name)) > _BATCH_NUMEL:
                yield batch
                batch = []
            batch.append(name)
        if batch:
            yield batch

    def _exchanged(
        self, sent: Tensor, *, send_splits: Sequence[int], receive_splits: Sequence[int]
    ) -> Tensor:
        """Return what the other ranks sent, in host memory."""
        received = torch.empty(sum(receive_splits), dtype=torch.float32, device=self._device)
        self._exchange(received, sent, receive_splits=receive_splits, send_splits=send_splits)
        return received.cpu()

    def _sent(self, batch: Sequence[str]) -> list[str]:
        """Return the parameters of which this rank has a shard, grouped by owner."""
        mine = [name for name in batch if name in self._own_ranges]
        return sorted(mine, key=lambda name: self._owners[name])  # stable: owner, then batch order

    def _sent_counts(self, batch: Sequence[str]) -> list[int]:
        """Return the elements of this rank's shards, per owner."""
        counts = [0] * self._exchange.size
        for name in batch:
            counts[self._owners[name]] += _length(self._own_ranges.get(name))
        return counts

    def _owned_counts(self, batch: Sequence[str]) -> list[int]:
        """Return the elements of the parameters owned here, per rank that has the shards."""
        return [
            sum(_length(ranges.get(name)) for name in batch if self.owns(name))
            for ranges in self._ranges
        ]

    def _owned_places(
        self, batch: Sequence[str], owned: Mapping[str, Tensor], buffer: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (range of an owned tensor, its place in the buffer), in the buffer's order."""
        offset = 0
        # The buffer is ordered by sending rank, then by batch: what all_to_all_single delivers when
        # every rank packs its shards as `_sent` orders them.
        for ranges in self._ranges:
            for name in batch:
                if name in ranges and self.owns(name):
                    start, end = ranges[name]
                    yield owned[name][start:end], buffer[offset : offset + end - start]
                    offset += end - start


def sharded_tensors(key: str, cut: Cut, piece: Tensor) -> list[ShardedTensor]:
    """Return Megatron's description of a tensor-parallel piece as slabs of the tensor ``key``.

    Args:
        key: Name in the checkpoint.
        cut: The place of the piece.
        piece: The piece, in its local shape; the result holds views of it.
    """
    if cut.slices == 1:
        return [ShardedTensor.from_rank_offsets(key, piece)]
    return [
        ShardedTensor.from_rank_offsets(
            key, block, (cut.dim, number * cut.slices + cut.index, cut.blocks * cut.slices)
        )
        for number, block in enumerate(piece.chunk(cut.blocks, dim=cut.dim))
    ]


def _length(place: tuple[int, int] | None) -> int:
    return place[1] - place[0] if place else 0


def _assign_owners(infos: Mapping[str, ParamInfo], ranks: int) -> dict[str, int]:
    """Give every parameter to the rank with the fewest elements so far, largest first.

    Deterministic, because every rank computes it alone: equal sizes are ordered by name.
    """
    loads = [0] * ranks
    owners: dict[str, int] = {}
    for name in sorted(infos, key=lambda n: (-infos[n].numel, n)):
        owner = loads.index(min(loads))
        owners[name] = owner
        loads[owner] += infos[name].numel
    return owners
