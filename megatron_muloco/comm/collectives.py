"""Every collective of a run: wires for reducers, all-to-all, broadcasts, gathers and sums.

A reducer decides what is sent; a `Wire` sends it. Both wires give the same bits:

- `DeviceWire` gives device memory to the group's backend.
- `HostWire` copies to host memory (pinned where there is an accelerator) and back. Its group needs
  a backend that sends from host memory (gloo). A device collective that waits for a low-bandwidth
  link occupies part of the accelerator all the time; a host collective does not.

A group of one rank sends nothing. `Layout` and `BufferPool` manage the buffers; `AllToAll` is the
all-to-all of the inner optimizer, which knows no process groups. `ReplicatedBroadcast` keeps
replicated parameters identical inside a replica. `gather_objects`, `sum_over`, `broadcast_object`,
`broadcast_tensor` and `barrier` serve control: start-up, checkpoints, evaluation, the stop request.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import deepspeed.comm as dist
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_muloco.comm.groups import Groups
from megatron_muloco.errors import RuntimeMismatch, SyncError
from megatron_muloco.params import Shard

__all__ = [
    "AllToAll",
    "BufferPool",
    "DeviceWire",
    "HostWire",
    "Layout",
    "Pending",
    "ReplicatedBroadcast",
    "Wire",
    "barrier",
    "broadcast_object",
    "broadcast_tensor",
    "gather_objects",
    "job_store",
    "sum_over",
]

# ------------------------------------------------------------------------------------------
# Flat buffers.


@dataclass(frozen=True, slots=True)
class Layout:
    """Names and sizes of tensors laid end to end in one flat buffer.

    Attributes:
        sizes: Name and number of elements of each tensor, in the order of the buffer.
    """

    sizes: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Layout":
        """Return the layout of ``tensors``, in the order of the mapping."""
        return cls(tuple((name, tensor.numel()) for name, tensor in tensors.items()))

    @property
    def numel(self) -> int:
        """Elements of all tensors together."""
        return sum(size for _, size in self.sizes)

    def pack(self, tensors: Mapping[str, Tensor], buffer: Tensor) -> None:
        """Copy ``tensors`` to the beginning of ``buffer``, converting to its dtype."""
        places = self.unpack(buffer)
        assert places.keys() == tensors.keys(), "packed names are not the given names"
        for name, tensor in tensors.items():
            places[name].copy_(tensor)

    def unpack(self, buffer: Tensor) -> dict[str, Tensor]:
        """Return views of ``buffer``, one for each tensor."""
        pieces = buffer[: self.numel].split([size for _, size in self.sizes])
        names = [name for name, _ in self.sizes]
        return dict(zip(names, pieces, strict=True))


class BufferPool:
    """Reusable flat buffers for reductions in flight.

    The pool holds as many buffers as were in use at the same time, not one for each fragment. When
    the last one is released, their memory goes back: between blocking outer steps the activations
    can have it. Page-locked buffers are kept, because locking takes long.

    Lifetime: a buffer belongs to the caller from `acquire` to `release`. In between a collective
    may read or write it at any time, so it is released only after `Pending.wait`.

    Args:
        device: Device of the buffers.
        pin_memory: Whether host memory is page-locked, for copies from and to an accelerator.
    """

    def __init__(self, device: torch.device, *, pin_memory: bool = False) -> None:
        self._device, self._pin_memory = device, pin_memory
        self._free: list[Tensor] = []
        self._in_use: list[tuple[Tensor, Tensor]] = []

    def acquire(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return a flat buffer of exactly ``numel`` elements with undefined contents."""
        wanted = numel * dtype.itemsize
        self._free.sort(key=Tensor.numel)
        index = next((i for i, free in enumerate(self._free) if free.numel() >= wanted), None)
        if index is not None:
            storage = self._free.pop(index)
        else:
            # Replace the smallest free buffer instead of adding one. Fragments differ in size, and
            # the pool would otherwise keep a set of buffers for each size it has ever seen.
            del self._free[:1]
            storage = torch.empty(
                wanted, dtype=torch.uint8, device=self._device, pin_memory=self._pin_memory
            )
        buffer = storage[:wanted].view(dtype)
        self._in_use.append((buffer, storage))
        return buffer

    def release(self, *buffers: Tensor) -> None:
        """Return buffers to the pool; views of them stay readable until the next `acquire`."""
        for buffer in buffers:
            index = next(i for i, (used, _) in enumerate(self._in_use) if used is buffer)
            self._free.append(self._in_use.pop(index)[1])
        if not self._in_use and not self._pin_memory:
            self._free.clear()


# ------------------------------------------------------------------------------------------
# Collectives of a reducer.


class Pending(Protocol):
    """A collective in progress."""

    def wait(self) -> None:
        """Return when the result may be read.

        On an accelerator the current stream waits, not the host.

        Raises:
            RuntimeError: The collective failed.
        """


class Wire(Protocol):
    """Starts collectives over one group without waiting for them.

    Collectives: every rank of the group starts the same ones in the same order. Neither buffer of
    a collective may be read or written before `Pending.wait` returns.
    """

    def all_reduce(self, buffer: Tensor) -> Pending:
        """Start to replace ``buffer`` by its sum over the group."""

    def all_to_all(
        self,
        received: Tensor,
        sent: Tensor,
        *,
        receive_splits: Sequence[int],
        send_splits: Sequence[int],
    ) -> Pending:
        """Start to send split i of flat ``sent`` to rank i; splits are in elements."""

    def all_gather(self, received: Tensor, own: Tensor) -> Pending:
        """Start to fill ``received`` with the ``own`` of every rank, in rank order."""


class _Done:
    """What a group of one rank waits for."""

    def wait(self) -> None:
        """Return at once."""


class DeviceWire:
    """Collectives from the memory in which the tensors are; see `Wire`.

    Args:
        group: The group; ``None`` for a single rank.
    """

    def __init__(self, group: ProcessGroup | None) -> None:
        self._group = group
        self._alone = group is None or dist.get_world_size(group) == 1

    def all_reduce(self, buffer: Tensor) -> Pending:
        """See `Wire.all_reduce`."""
        if self._alone:
            return _Done()
        work: Pending = dist.all_reduce(buffer, group=self._group, async_op=True)
        return work

    def all_to_all(
        self,
        received: Tensor,
        sent: Tensor,
        *,
        receive_splits: Sequence[int],
        send_splits: Sequence[int],
    ) -> Pending:
        """See `Wire.all_to_all`."""
        if self._alone:
            received.copy_(sent)
            return _Done()
        work: Pending = dist.all_to_all_single(
            received,
            sent,
            list(receive_splits),
            list(send_splits),
            group=self._group,
            async_op=True,
        )
        return work

    def all_gather(self, received: Tensor, own: Tensor) -> Pending:
        """See `Wire.all_gather`."""
        if self._alone or not own.numel():  # all ranks are equally empty: sizes are equal
            received.copy_(own)
            return _Done()
        work: Pending = dist.all_gather_into_tensor(received, own, group=self._group, async_op=True)
        return work


class HostWire:
    """Collectives from copies in host memory; see `Wire`.

    Lifetime of the copies: they are acquired at the start of a collective, because the caller's
    device buffers may be reused by the next kernel while the network still reads, and released by
    `_OnHost.wait`, after the result was copied back. A collective that fails keeps its copies: the
    backend may still write into them.

    Args:
        group: A group whose backend sends from host memory; ``None`` for a single rank.
        device: Device of the tensors.
    """

    def __init__(self, group: ProcessGroup | None, device: torch.device) -> None:
        self._wire = DeviceWire(group)
        self._pool = BufferPool(torch.device("cpu"), pin_memory=device.type == "cuda")

    def all_reduce(self, buffer: Tensor) -> Pending:
        """See `Wire.all_reduce`."""
        staged = self._staged(buffer)
        return _OnHost(self._wire.all_reduce(staged), self._pool, staged, buffer, (staged,))

    def all_to_all(
        self,
        received: Tensor,
        sent: Tensor,
        *,
        receive_splits: Sequence[int],
        send_splits: Sequence[int],
    ) -> Pending:
        """See `Wire.all_to_all`."""
        leaving, arriving = self._staged(sent), self._pool.acquire(received.numel(), received.dtype)
        pending = self._wire.all_to_all(
            arriving, leaving, receive_splits=receive_splits, send_splits=send_splits
        )
        return _OnHost(pending, self._pool, arriving, received, (leaving, arriving))

    def all_gather(self, received: Tensor, own: Tensor) -> Pending:
        """See `Wire.all_gather`."""
        leaving, arriving = self._staged(own), self._pool.acquire(received.numel(), received.dtype)
        pending = self._wire.all_gather(arriving, leaving)
        return _OnHost(pending, self._pool, arriving, received, (leaving, arriving))

    def _staged(self, values: Tensor) -> Tensor:
        # A blocking copy: the network reads host memory as soon as the collective has started, and
        # knows nothing of the device's streams.
        return self._pool.acquire(values.numel(), values.dtype).copy_(values)


@dataclass(frozen=True, slots=True)
class _OnHost:
    """A collective on host copies, and where its result belongs.

    Attributes:
        pending: The collective.
        pool: Owner of the copies.
        staged: Host copy that receives the result.
        into: The caller's tensor for the result.
        copies: All host copies of this collective.
    """

    pending: Any
    pool: BufferPool
    staged: Tensor
    into: Tensor
    copies: tuple[Tensor, ...]

    def wait(self) -> None:
        """See `Pending.wait`."""
        self.pending.wait()
        self.into.copy_(self.staged)
        for buffer in self.copies:
            self.pool.release(buffer)


# ------------------------------------------------------------------------------------------
# All-to-all of the inner optimizer.


class AllToAll:
    """All-to-all of flat buffers with uneven splits over one group.

    It lets `optim` exchange shards without knowing process groups.

    Attributes:
        size: Number of ranks in the group.
        rank: This rank's place in the group.

    Args:
        group: The group.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self.size: int = dist.get_world_size(group=group)
        self.rank: int = dist.get_rank(group=group)

    def start(
        self,
        received: Tensor,
        sent: Tensor,
        *,
        receive_splits: Sequence[int],
        send_splits: Sequence[int],
    ) -> Any:
        """Start to send split i of ``sent`` to group rank i; return a handle with ``wait()``.

        Neither buffer may be touched before ``wait()`` returns. Then ``received`` is filled in rank
        order. On an accelerator ``wait()`` makes the current stream wait, not the host.

        Collectives: one ``all_to_all_single`` over the group. Every rank of the group must start
        it, in the same order among its collectives, also a rank that sends and receives nothing. A
        rank that does not call it blocks the others until the group's time limit.
        """
        return dist.all_to_all_single(
            received,
            sent,
            output_split_sizes=list(receive_splits),
            input_split_sizes=list(send_splits),
            group=self._group,
            async_op=True,
        )

    def __call__(
        self,
        received: Tensor,
        sent: Tensor,
        *,
        receive_splits: Sequence[int],
        send_splits: Sequence[int],
    ) -> None:
        """Send split i of ``sent`` to group rank i and wait until ``received`` is filled.

        Collectives: as for `start`.
        """
        self.start(received, sent, receive_splits=receive_splits, send_splits=send_splits).wait()


# ------------------------------------------------------------------------------------------
# Collectives for control: small objects, small sums, a barrier and the job's key-value store.
#
# They never carry the data of an outer step. All of them block. In each, every rank of the group
# must take part at the same point of the program: a rank that stays away blocks the others until
# the group's time limit.


Value = TypeVar("Value")


def gather_objects(group: ProcessGroup | None, value: Value) -> list[Value]:
    """Return the ``value`` of every rank of ``group``, in the order of its ranks.

    Args:
        group: A process group; `Groups.control` for the whole job.
        value: Any picklable object; ranks may give objects of different sizes.

    Collectives: an all-gather of the sizes and one of the pickled values over ``group``, none for a
    group of one rank; each rank receives group size times the bytes of the largest value. Every
    rank of ``group`` calls it.
    """
    if torch.distributed.get_world_size(group) == 1:
        return [value]
    gathered: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(gathered, value, group=group)
    return gathered


def broadcast_object(control: ProcessGroup, value: Value) -> Value:
    """Return rank 0's ``value`` on every rank of the job.

    Args:
        control: `Groups.control`.
        value: Any picklable object on rank 0; ignored on other ranks.

    Collectives: a broadcast of the size and one of the pickled value over the job; every rank of
    the job calls it.
    """
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0, group=control)
    return values[0]


def broadcast_tensor(group: ProcessGroup, tensor: Tensor, *, source: int) -> None:
    """Overwrite ``tensor`` with that of one rank of ``group``.

    Args:
        group: A process group.
        tensor: A tensor on the device that the group's backend sends from; the same shape and dtype
            on all ranks.
        source: Index of the sending rank in ``group``.

    Collectives: one broadcast of ``tensor`` over ``group``, none for a group of one rank or an
    empty tensor, with which gloo would match a later message; every rank of ``group`` calls it.
    """
    if torch.distributed.get_world_size(group) > 1 and tensor.numel():
        torch.distributed.broadcast(tensor, group=group, group_src=source)


def sum_over(group: ProcessGroup, tensor: Tensor) -> Tensor:
    """Return the sum of ``tensor`` over ``group``; the input is kept.

    Args:
        group: A process group.
        tensor: A small tensor on the device that the group's backend sends from; the same shape and
            dtype on all ranks.

    Dtypes: the sum is computed in the dtype of ``tensor``.
    Collectives: one all-reduce of ``tensor`` over ``group``, none for a group of one rank; every
    rank of ``group`` calls it.
    """
    total = tensor.clone()
    if torch.distributed.get_world_size(group) > 1:
        torch.distributed.all_reduce(total, group=group)
    return total


def barrier(control: ProcessGroup) -> None:
    """Return when every rank of the job has called it with its `Groups.control`."""
    torch.distributed.barrier(group=control)


def job_store() -> Any:
    """Return the job's rendezvous store: keys and values that ranks exchange without a collective.

    torch gives no public access to it. A second store would need a second port.
    """
    return torch.distributed.distributed_c10d._get_default_store()


# ------------------------------------------------------------------------------------------
# Replicated parameters.
#
# Two kinds of parameters exist on several ranks of one replica. Norms are the same on all
# tensor-parallel ranks, and a tied output embedding on the last pipeline stage repeats the
# embedding of the first. Their copies are in different outer groups, whose sums may differ in the
# order of addition. Therefore only the primary rank (tensor-parallel rank 0; the first stage)
# takes part in the outer step, and broadcasts its new values to the copies.


class ReplicatedBroadcast:
    """Copies the masters of replicated parameters from their primary rank to the other ranks.

    Invariant: all copies have the same names and the same flat ranges (checked once).

    Args:
        groups: This rank's groups.
        shards: This rank's shards.
        masters: fp32 masters of the shards, by name.
        tied_name: Name of the tied embedding, or ``None`` when embeddings are untied.

    Raises:
        RuntimeMismatch: Copies are cut differently over data-parallel ranks.

    Collectives: the constructor gathers objects over the tensor-parallel group and, with tied
    embeddings, over the embedding group; every rank of the replica constructs it.
    """

    def __init__(
        self,
        groups: Groups,
        shards: Sequence[Shard],
        masters: Mapping[str, Tensor],
        *,
        tied_name: str | None,
    ) -> None:
        self._masters = masters
        pg = groups.pg
        replicated = [shard for shard in shards if shard.param.partition_dim is None]
        tied = [shard for shard in shards if shard.name == tied_name]
        self._routes: list[tuple[Any, list[Shard]]] = []
        if pg.tp.size() > 1:
            self._routes.append((pg.tp, replicated))
        if tied_name is not None and pg.embd is not None and pg.embd.size() > 1:
            self._routes.append((pg.embd, tied))
        for group, members in self._routes:
            _check_equal_ranges(group, members)
        self._routes = [(group, members) for group, members in self._routes if members]

    @torch.no_grad()
    def __call__(self, names: Collection[str]) -> None:
        """Overwrite the copies of the named parameters with the primary rank's masters.

        Collectives: a broadcast over the tensor-parallel group, and one over the embedding group on
        the first and last stage when embeddings are tied; 4 bytes per element. Every rank of the
        replica must call it with the same names.
        """
        wanted = frozenset(names)
        for group, members in self._routes:
            shards = [shard for shard in members if shard.name in wanted]
            if not shards:
                # On all ranks of the group alike. An empty broadcast is skipped, because gloo
                # would match a later message with it.
                continue
            flat = self._packed(shards)
            torch.distributed.broadcast(flat, group=group, group_src=0)
            for shard, piece in zip(shards, self._pieces(flat, shards), strict=True):
                self._masters[shard.name].copy_(piece)

    @torch.no_grad()
    def check(self, round_index: int, names: Collection[str] | None = None) -> None:
        """Raise `SyncError` naming the first parameter whose copies differ in any bit.

        Only ranks that differ from their primary rank raise; their end ends the job.

        Args:
            round_index: Round in the message.
            names: Parameters to compare; all by default. Right after a call with these names the
                copies are equal unless something is broken. At other times an optimizer whose
                kernels round differently on two ranks may have changed them.

        Collectives: as for the call, with the same bytes.
        """
        for group, members in self._routes:
            shards = [shard for shard in members if names is None or shard.name in names]
            if not shards:
                continue
            mine = self._packed(shards)
            received = mine.clone()
            torch.distributed.broadcast(received, group=group, group_src=0)
            for shard, own, other in zip(
                shards, self._pieces(mine, shards), self._pieces(received, shards), strict=True
            ):
                if not torch.equal(own.view(torch.int32), other.view(torch.int32)):
                    rank = torch.distributed.get_rank()
                    primary = torch.distributed.get_global_rank(group, 0)
                    raise SyncError(
                        f"round {round_index}: {shard.name}: rank {rank} holds other values than "
                        f"rank {primary}, though both hold the same parameter. The copies inside "
                        "the replica have drifted apart. Resume from a checkpoint before this "
                        "round; if it happens again, suspect the hardware of one of them."
                    )

    def _packed(self, shards: Sequence[Shard]) -> Tensor:
        return torch.cat([self._masters[shard.name] for shard in shards])

    @staticmethod
    def _pieces(flat: Tensor, shards: Sequence[Shard]) -> Sequence[Tensor]:
        pieces: Sequence[Tensor] = flat.split([shard.numel for shard in shards])
        return pieces


def _check_equal_ranges(group: Any, shards: Sequence[Shard]) -> None:
    """Raise unless all ranks of ``group`` hold the same ranges of the replicated parameters."""
    mine = [(shard.name, shard.start, shard.end) for shard in shards]
    theirs = gather_objects(group, mine)
    if any(other != mine for other in theirs):
        raise RuntimeMismatch(
            "ranks that hold the same parameters shard them differently over data-parallel ranks: "
            f"{theirs}. The copies could not be kept equal. Give all of them the same settings of "
            "Megatron's distributed optimizer."
        )
