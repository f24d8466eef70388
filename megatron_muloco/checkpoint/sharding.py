"""`ModelSpace` turns the flat shards of data-parallel ranks into whole pieces, and back.

A checkpoint is stored in model space: it does not depend on how data parallelism cut the masters.
Each parameter of a pipeline stage has one *owner* among the dp x cp ranks. To save, the shards of a
parameter are sent to its owner, which writes the whole tensor-parallel piece. To load, the owner
reads the piece and sends the shards back. The owners divide the elements evenly, so no rank needs
memory for more than its share, and a replica writes and reads each element once::

    dp 0  [aaa|bb]        gather       owner of a: dp 0   [aaaaaa]
    dp 1  [aaa|bbbb]   ------------>   owner of b: dp 1   [bbbbbb]

`Cut` is the other half: where a tensor-parallel piece lies in the whole parameter. It is arithmetic
on shapes, and the digests of `model_digests` use it too.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from megatron_muloco.comm.collectives import AllToAll, gather_objects
from megatron_muloco.comm.groups import Groups
from megatron_muloco.params import ParamInfo, Shard

__all__ = [
    "Cut",
    "ModelSpace",
    "digest_sum",
    "model_digests",
    "render",
    "sharded_tensors",
    "whole_index",
]

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
        self._infos, self.device = infos, device
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
            leaving = [pieces[name].detach().view(-1).to(self.device) for name in self._sent(batch)]
            # A rank may have no shard in this batch; torch.cat needs at least one tensor.
            empty = torch.empty(0, dtype=torch.float32, device=self.device)
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
                leaving.to(self.device),
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
        received = torch.empty(sum(receive_splits), dtype=torch.float32, device=self.device)
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


# ------------------------------------------------------------------------------------------
# Digests: 64 bits for named fp32 tensors, whatever their shards.
#
# Every element contributes ``mix(name, index in the whole parameter, bits)``, and the contributions
# are added modulo 2**64. Addition commutes, so the partial sums of any layout add up to the same
# number. The digest detects differences, also after a change of layout. It does not resist an
# adversary.
#
# Source: the mixing function is the finaliser of SplitMix64 (Steele, Lea, Flood, "Fast splittable
# pseudorandom number generators", OOPSLA 2014); adding up mixed elements is a multiset hash.


# Elements hashed at a time: 8 MiB for each of the few int64 temporaries.
_CHUNK = 1 << 20


def _signed(value: int) -> int:
    """Return the int64 with the bits of an unsigned value; torch has no uint64 arithmetic."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def model_digests(
    kinds: Mapping[str, Mapping[str, Tensor]],
    shards: Sequence[Shard],
    *,
    tensor_rank: int,
    tensor_size: int,
    all_reduce: Callable[[Tensor], None],
) -> dict[str, str]:
    """Return a digest of 16 hexadecimal digits for each kind of tensor, equal on every rank.

    Args:
        kinds: Kind -> parameter name -> this rank's flat fp32 values; the same kinds on every rank
            of the replica.
        shards: This rank's shards. Those of a replicated parameter count on its primary rank only.
        tensor_rank: This rank's index among the tensor-parallel ranks.
        tensor_size: Number of tensor-parallel ranks.
        all_reduce: Function that sums an int64 tensor over all ranks of the replica, in place.

    Collectives: ``all_reduce`` once, 8 bytes a kind; every rank of the replica must call it.
    """
    sums = [
        digest_sum(
            [(shard, tensors[shard.name]) for shard in shards if shard.name in tensors],
            tensor_rank=tensor_rank,
            tensor_size=tensor_size,
        )
        for tensors in kinds.values()
    ]
    total = torch.cat(sums) if sums else torch.zeros(0, dtype=torch.int64)
    all_reduce(total)
    return dict(zip(kinds, map(render, total.tolist()), strict=True))


def render(total: int) -> str:
    """Return a sum as 16 hexadecimal digits."""
    return f"{total % (1 << 64):016x}"


@torch.no_grad()
def digest_sum(
    pieces: Iterable[tuple[Shard, Tensor]], *, tensor_rank: int, tensor_size: int
) -> Tensor:
    """Return this rank's part of the digest: one int64 number modulo 2**64, on the host."""
    total = torch.zeros(1, dtype=torch.int64)
    for shard, values in pieces:
        if not shard.param.is_primary:
            continue
        assert values.dtype == torch.float32, f"{shard.name} is {values.dtype}"
        cut = Cut(shard.param, tensor_rank, tensor_size)
        name = _name_hash(shard.name)
        # In chunks, because an index and a hash of 8 bytes each per element of a whole embedding
        # would not fit beside it.
        for first in range(0, shard.numel, _CHUNK):
            chunk = values.detach().view(-1)[first : first + _CHUNK]
            local = torch.arange(first, first + chunk.numel(), device=chunk.device) + shard.start
            total += _contribution(name, whole_index(cut, local), chunk).sum().cpu()
    return total


def whole_index(cut: Cut, local: Tensor) -> Tensor:
    """Return the flat index in the whole parameter of flat indices into this rank's piece."""
    # Seen from the cut dimension a flat index is (outer, along, inner). Only ``along`` changes: the
    # local one becomes (block, offset), and slice ``index`` of that block starts further in.
    shape = cut.param.local_shape
    inner = 1
    for size in shape[cut.dim + 1 :]:
        inner *= size
    length, slices = cut.slice_length, cut.slices
    rest, along = local % inner, local // inner
    outer, along = along // shape[cut.dim], along % shape[cut.dim]
    block, offset = along // length, along % length
    along = (block * slices + cut.index) * length + offset
    return (outer * (shape[cut.dim] * slices) + along) * inner + rest


def _name_hash(name: str) -> int:
    raw = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(raw, "little", signed=True)


def _contribution(name: int, index: Tensor, values: Tensor) -> Tensor:
    # The index is mixed before the bits come in; a plain sum of the two would let a change of one
    # cancel a change of the other.
    bits = values.contiguous().view(torch.int32).to(torch.int64)
    return _mix(_mix(index * _GOLDEN + name) ^ bits)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; torch's shift of an int64 repeats the sign bit."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
