"""`ModelSpace` turns the flat shards of data-parallel ranks into parts of whole pieces, and back.

A checkpoint is stored in model space: it does not depend on how data parallelism cut the masters.
The tensor-parallel pieces of a pipeline stage, laid end to end, are divided into `Part`s of equal
size, one share for each rank. To save, the shards that overlap a part are sent to its rank, which
writes it. To load, that rank reads the part and sends the shards back::

    dp 0  [aaa|bb]        gather       part of dp 0   [aaaaaa]
    dp 1  [aaa|bbbb]   ------------>   part of dp 1   [bbbbbb]

Tensors that each replica has for itself are divided among the dp x cp ranks of the replica. Those
that replicas share are divided among the ranks of all replicas, so each element is written and read
once, and no rank needs memory for more than its share. What one replica has read, it broadcasts to
the others.

`Cut` is the other half: where a tensor-parallel piece lies in the whole parameter. It is arithmetic
on shapes, and the digests of `model_digests` use it too.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from megatron_muloco.comm.collectives import AllToAll, broadcast_tensor, gather_objects
from megatron_muloco.comm.groups import Groups
from megatron_muloco.model.initialise import poison
from megatron_muloco.params import ParamInfo, Shard

__all__ = [
    "Cut",
    "ModelSpace",
    "Part",
    "digest_sum",
    "divide",
    "model_digests",
    "render",
    "sharded_tensors",
    "stored_edges",
    "whole_index",
]

# Elements of the parts that travel together: at most 256 MiB of fp32 each way at a rank.
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
        return 2 if self.param.kind == "fc1" and self.slices > 1 else 1

    @property
    def slice_length(self) -> int:
        """Length along ``dim`` of one slice of one block."""
        return self.param.local_shape[self.dim] // self.blocks

    @property
    def row_numel(self) -> int:
        """Elements of the piece for one index of its first dimension."""
        return self.param.numel // self.param.local_shape[0]


@dataclass(frozen=True, slots=True)
class Part:
    """Whole rows of a tensor-parallel piece, which one rank writes or reads.

    Attributes:
        name: Name of the parameter.
        start: First element, as a flat index in the piece.
        end: Element after the last.
        rank: Index among the dp x cp ranks of a replica.
        replica: The replica whose rank has it; ``None`` where each replica has its own values.
    """

    name: str
    start: int
    end: int
    rank: int
    replica: int | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.end - self.start

    def overlap(self, place: tuple[int, int] | None) -> tuple[int, int]:
        """Return the flat range that lies in the part and in ``place``; it may be empty."""
        if place is None:
            return self.start, self.start
        start = max(self.start, place[0])
        return start, max(start, min(self.end, place[1]))


class ModelSpace:
    """Moves this rank's shards to the ranks of their parts, and back.

    Invariant: all dp x cp ranks know the same parameters, in the same order, and the ranks at this
    position of all replicas hold the same shards of them.

    Args:
        groups: This rank's groups.
        infos: Every parameter of this stage, in the order of the stage.
        shards: This rank's shards of them.
        device: The device that the group's backend sends from.

    Collectives: construction gathers every rank's ranges over dp x cp (one small object per rank).
    All ranks of that group call `names`, `gather` and `scatter` in the same order, with the same
    names or parts; with shared parts also the same ranks of the other replicas.
    """

    def __init__(
        self,
        groups: Groups,
        infos: Mapping[str, ParamInfo],
        shards: Sequence[Shard],
        device: torch.device,
    ) -> None:
        self._group, self._outer = groups.pg.dp_cp, groups.outer
        self._exchange = AllToAll(self._group)
        self._infos, self.device = infos, device
        self._topology, self._coords = groups.topology, groups.coords
        mine = {shard.name: (shard.start, shard.end) for shard in shards}
        self._ranges: list[dict[str, tuple[int, int]]] = gather_objects(self._group, mine)

    def cut(self, name: str) -> Cut:
        """Return the place of this rank's piece in the whole parameter."""
        return Cut(self._infos[name], self._coords.tp, self._topology.tensor)

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

    def parts(
        self,
        names: Sequence[str],
        *,
        shared: bool,
        edges: Callable[[str], Sequence[int]] | None = None,
    ) -> list[Part]:
        """Return the parts of the named pieces of this stage and tensor-parallel rank.

        Args:
            names: Parameters; the same on all ranks that will move the parts.
            shared: Whether all replicas have these values, and divide them among each other.
            edges: Function that returns the sorted flat indices between which a piece may be cut,
                with 0 and its end. By default, it may be cut between rows.
        """
        size = self._exchange.size
        sizes = {name: self._infos[name].numel for name in names}
        shares = size * (self._topology.num_replicas if shared else 1)

        def snap(name: str, place: int) -> int:
            if edges is None:
                row = self.cut(name).row_numel
                return (place + row // 2) // row * row
            return min(edges(name), key=lambda edge: abs(edge - place))

        return [
            Part(name, start, end, share % size, share // size if shared else None)
            for name, start, end, share in divide(sizes, shares, snap)
        ]

    def has(self, part: Part) -> bool:
        """Whether this rank writes and reads the part."""
        return part.rank == self._exchange.rank and part.replica in (None, self._coords.replica)

    def gather(
        self,
        pieces: Mapping[str, Tensor],
        parts: Sequence[Part],
        *,
        allocate: Callable[[Part], Tensor] | None = None,
    ) -> dict[Part, Tensor]:
        """Return the parts that this rank has, flat, in host memory: copies, never views.

        Args:
            pieces: This rank's flat fp32 shards, by name.
            parts: Parts to gather; those of other replicas are left out.
            allocate: Function that returns fp32 host memory for a part; new memory by default.

        Collectives: one all-to-all over dp x cp per batch of parts, 4 bytes an element; every rank
        of the group calls it, also with no shard of any of the parts.
        """
        allocate = allocate or _new
        gathered: dict[Part, Tensor] = {}
        here = [part for part in parts if part.replica in (None, self._coords.replica)]
        if self._exchange.size == 1:  # a part is a range of this rank's own shard
            for part in here:
                start, end = part.overlap(self._own_ranges.get(part.name))
                gathered[part] = allocate(part)
                first = self._own_ranges[part.name][0]
                shard = pieces[part.name].detach().view(-1)
                gathered[part].copy_(shard[start - first : end - first])
            return gathered
        # Batches bound the send and receive buffers. Every rank derives the same batches from the
        # same parts, so the all-to-alls pair up although each rank sends other elements.
        for batch in _batches(here):
            leaving = [
                pieces[part.name].detach().view(-1)[start:end].to(self.device)
                for part, start, end in self._sent(batch)
            ]
            # A rank may have no shard in this batch; torch.cat needs at least one tensor.
            empty = torch.empty(0, dtype=torch.float32, device=self.device)
            arrived = self._exchanged(
                torch.cat([empty, *leaving]),
                send_splits=self._sent_counts(batch),
                receive_splits=self._own_counts(batch),
            )
            own = {part: allocate(part) for part in self._own(batch)}
            for place, piece in self._own_places(batch, own, arrived):
                place.copy_(piece)
            gathered.update(own)
        return gathered

    def scatter(self, values: Mapping[Part, Tensor], parts: Sequence[Part]) -> dict[str, Tensor]:
        """Return this rank's flat shards in host memory: the inverse of `gather`.

        Elements that lie in none of the parts are poison.

        Args:
            values: The parts that this rank has.
            parts: Parts to scatter, of all replicas.

        Collectives: for each batch of parts one all-to-all over dp x cp, as in `gather`. Before it,
        the replica that has a batch of shared parts broadcasts it over the outer group, 4 bytes an
        element. Every rank of both groups calls it.
        """
        pieces = {
            name: poison(torch.empty(_length(self._own_ranges[name]), dtype=torch.float32))
            for name in dict.fromkeys(part.name for part in parts)
            if name in self._own_ranges
        }
        for replica, found in groupby(parts, key=lambda part: part.replica):
            for batch in _batches(list(found)):
                leaving = torch.empty(sum(self._own_counts(batch)), dtype=torch.float32)
                if replica in (None, self._coords.replica):
                    for place, piece in self._own_places(batch, values, leaving):
                        piece.copy_(place)
                leaving = leaving.to(self.device)
                if replica is not None:
                    # Equal positions hold equal shards, so all of them pack a buffer alike.
                    broadcast_tensor(self._outer, leaving, source=replica)
                arrived = self._exchanged(
                    leaving,
                    send_splits=self._own_counts(batch),
                    receive_splits=self._sent_counts(batch),
                )
                # `gather` sent the elements in this order, grouped by rank, so they return in it.
                mine = list(self._sent(batch))
                returned = arrived.split([end - start for _, start, end in mine])
                for (part, start, end), piece in zip(mine, returned, strict=True):
                    pieces[part.name][start:end] = piece
        return pieces

    # ---- layout of the buffers --------------------------------------------------------------

    @property
    def _own_ranges(self) -> dict[str, tuple[int, int]]:
        return self._ranges[self._exchange.rank]

    def _exchanged(
        self, sent: Tensor, *, send_splits: Sequence[int], receive_splits: Sequence[int]
    ) -> Tensor:
        """Return what the other ranks sent, in host memory."""
        received = torch.empty(sum(receive_splits), dtype=torch.float32, device=self.device)
        self._exchange(received, sent, receive_splits=receive_splits, send_splits=send_splits)
        return received.cpu()

    def _sent(self, batch: Sequence[Part]) -> Iterator[tuple[Part, int, int]]:
        """Yield (part, range of this rank's shard that lies in it), grouped by the part's rank."""
        for part in sorted(batch, key=lambda part: part.rank):  # stable: rank, then batch order
            place = self._own_ranges.get(part.name)
            start, end = part.overlap(place)
            if place is not None and start < end:
                yield part, start - place[0], end - place[0]

    def _sent_counts(self, batch: Sequence[Part]) -> list[int]:
        """Return the elements of this rank's shards in the parts of each rank."""
        counts = [0] * self._exchange.size
        for part, start, end in self._sent(batch):
            counts[part.rank] += end - start
        return counts

    def _own(self, batch: Sequence[Part]) -> list[Part]:
        """Return the parts of the rank at this position, in this replica or another."""
        return [part for part in batch if part.rank == self._exchange.rank]

    def _own_counts(self, batch: Sequence[Part]) -> list[int]:
        """Return the elements of `_own` parts, per rank that has the shards."""
        own = self._own(batch)
        return [
            sum(_length(part.overlap(ranges.get(part.name))) for part in own)
            for ranges in self._ranges
        ]

    def _own_places(
        self, batch: Sequence[Part], values: Mapping[Part, Tensor], buffer: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (range of a part's values, its place in the buffer), in the buffer's order."""
        offset = 0
        # The buffer is ordered by sending rank, then by batch: what all_to_all_single delivers when
        # every rank packs its shards as `_sent` orders them.
        for ranges in self._ranges:
            for part in self._own(batch):
                start, end = part.overlap(ranges.get(part.name))
                if start < end:
                    place = values[part][start - part.start : end - part.start]
                    yield place, buffer[offset : offset + end - start]
                    offset += end - start


def divide(
    sizes: Mapping[str, int], shares: int, snap: Callable[[str, int], int]
) -> Iterator[tuple[str, int, int, int]]:
    """Divide tensors, laid end to end, into shares of nearly equal size.

    Every rank computes the same division alone.

    Args:
        sizes: Name -> number of elements.
        shares: Number of shares.
        snap: Function of a name and a flat index that returns the nearest index where that tensor
            may be cut.

    Yields:
        Name, first element, element after the last, and share.
    """
    total = sum(sizes.values())
    offset = 0
    for name, size in sizes.items():
        if not size:
            continue
        first, last = (place * shares // total for place in (offset, offset + size - 1))
        # Share i begins at element i * total / shares of all.
        ideal = [share * total // shares - offset for share in range(first + 1, last + 1)]
        cuts = [0, *(snap(name, place) for place in ideal), size]
        for share, (start, end) in enumerate(pairwise(cuts), start=first):
            if start < end:
                yield name, start, end, share
        offset += size


def _batches(parts: Sequence[Part]) -> Iterator[list[Part]]:
    batch: list[Part] = []
    numel = 0
    for part in parts:
        if batch and numel + part.numel > _BATCH_NUMEL:
            yield batch
            batch, numel = [], 0
        batch.append(part)
        numel += part.numel
    if batch:
        yield batch


def sharded_tensors(key: str, cut: Cut, part: Part, values: Tensor) -> Iterator[ShardedTensor]:
    """Yield Megatron's description of a part as slabs of the tensor ``key``.

    Args:
        key: Name in the checkpoint.
        cut: The place of the piece.
        part: Rows of the piece.
        values: The part, flat; the result holds views of it.
    """
    shape = list(cut.param.local_shape)
    whole, offset = list(shape), [0] * len(shape)
    whole[cut.dim] *= cut.slices
    if cut.dim:
        offset[cut.dim] = cut.index * cut.slice_length
    for (start, end), first in _slabs(cut, part.start // cut.row_numel, part.end // cut.row_numel):
        begin = start * cut.row_numel - part.start
        data = values[begin : begin + (end - start) * cut.row_numel].view(-1, *shape[1:])
        yield ShardedTensor(
            key=key,
            data=data,
            dtype=data.dtype,
            local_shape=tuple(data.shape),
            global_shape=tuple(whole),
            global_offset=(first, *offset[1:]),
            axis_fragmentations=None,  # shares are not equal to the row, so there is no grid
        )


def stored_edges(cut: Cut, chunks: Iterable[tuple[Sequence[int], Sequence[int]]]) -> list[int]:
    """Return the flat indices of a piece at which stored chunks of its tensor begin or end.

    A rank that reads whole chunks reads nothing twice: torch reads a chunk as a whole.

    Args:
        cut: The place of the piece.
        chunks: Offsets and sizes of the chunks in the whole tensor.
    """
    rows = {edge for offsets, sizes in chunks for edge in (offsets[0], offsets[0] + sizes[0])}
    found = {0, cut.param.local_shape[0]}
    for (start, end), first in _slabs(cut, 0, cut.param.local_shape[0]):
        found |= {start, end}
        found |= {start + row - first for row in rows if first < row < first + end - start}
    return [row * cut.row_numel for row in sorted(found)]


def _slabs(cut: Cut, start: int, end: int) -> Iterator[tuple[tuple[int, int], int]]:
    """Yield rows of a piece that are adjacent in the whole tensor, and the first one's row there.

    Args:
        cut: The place of the piece.
        start: First row of the piece.
        end: Row after the last.
    """
    if cut.dim:
        yield (start, end), start
        return
    length = cut.slice_length
    for block in range(cut.blocks):
        first, last = max(start, block * length), min(end, (block + 1) * length)
        if first < last:
            yield (first, last), (block * (cut.slices - 1) + cut.index) * length + first


def _new(part: Part) -> Tensor:
    return torch.empty(part.numel, dtype=torch.float32)


def _length(place: tuple[int, int]) -> int:
    return place[1] - place[0]


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
    device: torch.device,
    all_reduce: Callable[[Tensor], object],
) -> dict[str, str]:
    """Return a digest of 16 hexadecimal digits for each kind of tensor, equal on every rank.

    Args:
        kinds: Kind -> parameter name -> this rank's flat fp32 values; the same kinds on every rank
            of the replica.
        shards: This rank's shards. Those of a replicated parameter count on its primary rank only.
        tensor_rank: This rank's index among the tensor-parallel ranks.
        tensor_size: Number of tensor-parallel ranks.
        device: Device that hashes.
        all_reduce: Function that sums an int64 tensor on that device over all ranks of the replica,
            in place.

    Collectives: ``all_reduce`` once, 8 bytes a kind; every rank of the replica must call it.
    """
    sums = [
        digest_sum(
            [(shard, tensors[shard.name]) for shard in shards if shard.name in tensors],
            tensor_rank=tensor_rank,
            tensor_size=tensor_size,
            device=device,
        )
        for tensors in kinds.values()
    ]
    total = torch.cat(sums) if sums else torch.zeros(0, dtype=torch.int64, device=device)
    all_reduce(total)
    return dict(zip(kinds, map(render, total.tolist()), strict=True))


def render(total: int) -> str:
    """Return a sum as 16 hexadecimal digits."""
    return f"{total % (1 << 64):016x}"


@torch.no_grad()
def digest_sum(
    pieces: Iterable[tuple[Shard, Tensor]],
    *,
    tensor_rank: int,
    tensor_size: int,
    device: torch.device,
) -> Tensor:
    """Return this rank's part of the digest: one int64 number modulo 2**64, on ``device``.

    The values may be anywhere. Those of a load and of an outer state in host memory are copied to
    the device in chunks, where an accelerator hashes them far faster than a core.
    """
    total = torch.zeros(1, dtype=torch.int64, device=device)
    for shard, values in pieces:
        if not shard.param.is_primary:
            continue
        assert values.dtype == torch.float32, f"{shard.name} is {values.dtype}"
        cut = Cut(shard.param, tensor_rank, tensor_size)
        name = _name_hash(shard.name)
        # In chunks, because an index and a hash of 8 bytes each per element of a whole embedding
        # would not fit beside it.
        for first in range(0, shard.numel, _CHUNK):
            chunk = values.detach().view(-1)[first : first + _CHUNK].to(device)
            local = torch.arange(first, first + chunk.numel(), device=device) + shard.start
            total += _contribution(name, whole_index(cut, local), chunk).sum()
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
