"""The collectives of a reducer, from device memory or through the host.

A reducer names what moves; a wire moves it. Both kinds give the same bits:

- `DeviceWire` hands device memory to the group's backend.
- `HostWire` copies to host memory (pinned beside an accelerator) and back, and needs a group whose
  backend sends from there (gloo). A device collective that waits for a thin link keeps part of the
  accelerator busy; a host one does not.

A group of one rank moves nothing.
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
# Flat buffers for collectives: where each tensor lies in one, and keeping them between rounds.


@dataclass(frozen=True, slots=True)
class Layout:
    """Names and sizes of tensors laid end to end in one flat buffer."""

    sizes: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Layout":
        """Return the layout of ``tensors`` in their order."""
        return cls(tuple((name, tensor.numel()) for name, tensor in tensors.items()))

    @property
    def numel(self) -> int:
        """Elements of all tensors together."""
        return sum(size for _, size in self.sizes)

    def pack(self, tensors: Mapping[str, Tensor], buffer: Tensor) -> None:
        """Copy ``tensors`` to the head of ``buffer``, converting to its dtype."""
        places = self.unpack(buffer)
        assert places.keys() == tensors.keys(), "packed names are not the given names"
        for name, tensor in tensors.items():
            places[name].copy_(tensor)

    def unpack(self, buffer: Tensor) -> dict[str, Tensor]:
        """Return each tensor's place in ``buffer``, as views."""
        pieces = buffer[: self.numel].split([size for _, size in self.sizes])
        names = [name for name, _ in self.sizes]
        return dict(zip(names, pieces, strict=True))


class BufferPool:
    """Buffers that outlive a round, so that an outer step allocates nothing new after the first.

    As many exist as were ever in use at once, not one for every fragment.

    Args:
        device: Where they are.
        pin_memory: For host memory that an accelerator copies to and from.
    """

    def __init__(self, device: torch.device, *, pin_memory: bool = False) -> None:
        self._device, self._pin_memory = device, pin_memory
        self._free: list[Tensor] = []
        self._lent: list[tuple[Tensor, Tensor]] = []

    def acquire(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return a flat buffer of exactly this size, contents undefined."""
        wanted = numel * dtype.itemsize
        self._free.sort(key=Tensor.numel)
        index = next((i for i, free in enumerate(self._free) if free.numel() >= wanted), None)
        if index is not None:
            storage = self._free.pop(index)
        else:
            # Grow instead of adding: the smallest free buffer makes room for this one.
            del self._free[:1]
            storage = torch.empty(
                wanted, dtype=torch.uint8, device=self._device, pin_memory=self._pin_memory
            )
        buffer = storage[:wanted].view(dtype)
        self._lent.append((buffer, storage))
        return buffer

    def release(self, *buffers: Tensor) -> None:
        """Take back buffers; their contents stay until they are taken again."""
        for buffer in buffers:
            index = next(i for i, (lent, _) in enumerate(self._lent) if lent is buffer)
            self._free.append(self._lent.pop(index)[1])


# ------------------------------------------------------------------------------------------


class Pending(Protocol):
    """A collective under way."""

    def wait(self) -> None:
        """Return when the result may be read; raise `RuntimeError` where the collective failed."""


class Wire(Protocol):
    """Starts collectives over one group; every rank of it starts the same ones in one order.

    Neither buffer of a collective may be touched before `Pending.wait`.
    """

    def all_reduce(self, buffer: Tensor) -> Pending:
        """Start replacing ``buffer`` by its sum over the group."""

    def all_to_all(
        self,
        received: Tensor,
        sent: Tensor,
        *,
        receive_splits: Sequence[int],
        send_splits: Sequence[int],
    ) -> Pending:
        """Start sending split i of flat ``sent`` to rank i, into its ``received``."""

    def all_gather(self, received: Tensor, own: Tensor) -> Pending:
        """Start filling ``received`` with everybody's ``own``, in the order of ranks."""


class _Done:
    def wait(self) -> None:
        """Nothing was started."""


class DeviceWire:
    """Collectives from the memory that the tensors are in; see `Wire`.

    Args:
        group: ``None`` for a single rank.
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
        if self._alone or not own.numel():
            received.copy_(own)
            return _Done()
        work: Pending = dist.all_gather_into_tensor(received, own, group=self._group, async_op=True)
        return work


class HostWire:
    """Collectives from host memory; see `Wire`.

    Args:
        group: A group whose backend sends from host memory; ``None`` for a single rank.
        device: Where the tensors are.
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
        return self._pool.acquire(values.numel(), values.dtype).copy_(values)


@dataclass(frozen=True, slots=True)
class _OnHost:
    """A host collective, whose result goes back to where it was asked for."""

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
# The all-to-all of the inner optimizer, as an object that does not show process groups.


class AllToAll:
    """All-to-all of flat buffers with uneven splits over one group."""

    def __init__(self, group: ProcessGroup) -> None:
        """Remember the group and this rank's place in it."""
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
        """Start sending split i of ``sent`` to group rank i; return a handle.

        Neither buffer may be touched before the handle's ``wait()``; then ``received`` is filled in
        the order of ranks. On an accelerator ``wait()`` holds the current stream, not the host.

        Collectives: one ``all_to_all_single`` over the group. Every rank of the group must start
        it, in the same order among others, also a rank that sends and receives nothing; one that
        stays away blocks the others until the group's time limit.
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
        """Send split i of ``sent`` to group rank i; return when ``received`` is filled.

        Collectives: as `start`.
        """
        self.start(received, sent, receive_splits=receive_splits, send_splits=send_splits).wait()
