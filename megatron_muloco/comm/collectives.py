"""Asynchronous collectives over one group, and the flat buffers that they read and write.

A reducer decides what is sent; a `Wire` sends it. Both wires give the same bits:

- `DeviceWire` gives device memory to the group's backend.
- `HostWire` copies to host memory (pinned where there is an accelerator) and back. Its group needs
  a backend that sends from host memory (gloo). A device collective that waits for a low-bandwidth
  link occupies part of the accelerator all the time; a host collective does not.

A group of one rank sends nothing. `Layout` and `BufferPool` manage the buffers; `AllToAll` is the
all-to-all of the inner optimizer, which knows no process groups.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import deepspeed.comm as dist
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

__all__ = ["AllToAll", "BufferPool", "DeviceWire", "HostWire", "Layout", "Pending", "Wire"]


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
    """Reusable flat buffers, so that outer steps allocate nothing after the first round.

    The pool holds as many buffers as were ever in use at the same time, not one for each fragment.
    Lifetime: a buffer belongs to the caller from `acquire` to `release`. In between a collective
    may read or write it at any time, so it is released only after `Pending.wait`.

    Args:
        device: Device of the buffers.
        pin_memory: Whether host memory is page-locked, for copies from and to an accelerator.
    """

    def __init__(self, device: torch.device, *, pin_memory: bool = False) -> None:
        self._device, self._pin_memory = device, pin_memory
        self._free: list[Tensor] = []
        self._lent: list[tuple[Tensor, Tensor]] = []

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
        self._lent.append((buffer, storage))
        return buffer

    def release(self, *buffers: Tensor) -> None:
        """Return buffers to the pool; views of them stay readable until the next `acquire`."""
        for buffer in buffers:
            index = next(i for i, (lent, _) in enumerate(self._lent) if lent is buffer)
            self._free.append(self._lent.pop(index)[1])


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
        borrowed: All host copies of this collective.
    """

    pending: Any
    pool: BufferPool
    staged: Tensor
    into: Tensor
    borrowed: tuple[Tensor, ...]

    def wait(self) -> None:
        """See `Pending.wait`."""
        self.pending.wait()
        self.into.copy_(self.staged)
        for buffer in self.borrowed:
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
