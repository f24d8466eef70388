"""The collectives of a reducer, from device memory or through the host.

A reducer names what moves; a wire moves it. Both kinds give the same bits:

- `DeviceWire` hands device memory to the group's backend.
- `HostWire` copies to host memory (pinned beside an accelerator) and back, and needs a group whose
  backend sends from there (gloo). A device collective that waits for a thin link keeps part of the
  accelerator busy; a host one does not.

A group of one rank moves nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import deepspeed.comm as dist
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_muloco.comm.buffers import BufferPool

__all__ = ["DeviceWire", "HostWire", "Pending", "Wire"]


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
        leaving, arriving = self._staged(sent), self._pool.take(received.numel(), received.dtype)
        pending = self._wire.all_to_all(
            arriving, leaving, receive_splits=receive_splits, send_splits=send_splits
        )
        return _OnHost(pending, self._pool, arriving, received, (leaving, arriving))

    def all_gather(self, received: Tensor, own: Tensor) -> Pending:
        """See `Wire.all_gather`."""
        leaving, arriving = self._staged(own), self._pool.take(received.numel(), received.dtype)
        pending = self._wire.all_gather(arriving, leaving)
        return _OnHost(pending, self._pool, arriving, received, (leaving, arriving))

    def _staged(self, values: Tensor) -> Tensor:
        return self._pool.take(values.numel(), values.dtype).copy_(values)


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
            self.pool.give(buffer)
