"""`AloneGroup` is the process group of one rank: each collective is a copy, and nothing is sent.

A rank whose layout has one data-parallel rank, or no tensor parallelism, still gives Megatron a
group for that division, and Megatron sends gradients and parameters through it. A communicator for
one rank would cost a start-up of NCCL on every rank, device memory, and a kernel for each call.

The group is made without `torch.distributed.new_group`, which talks to the rendezvous store. torch
has no public way to make a group known without it, so `make_alone` enters it in the four tables
that `torch.distributed` reads: of backends, names, ranks and configurations.
"""

# torch's stub gives these methods overloads; torch calls them with lists and an options object.
# mypy: disable-error-code="override,explicit-override,assignment,call-arg,attr-defined"

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, distributed_c10d

__all__ = ["AloneGroup", "make_alone"]

_NAME = "alone"


class _Done(dist.Work):
    """A collective that ended when it was called; its copies are in the current stream."""

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Return at once."""
        return True

    def is_completed(self) -> bool:
        """Return that the collective has ended."""
        return True

    def is_success(self) -> bool:
        """Return that it did not fail."""
        return True

    def get_future(self) -> torch.futures.Future[Any]:
        """Return a future that has its result."""
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result(None)
        return future


class AloneGroup(ProcessGroup):
    """A process group of this rank only; torch.distributed calls its methods.

    Every reduction over one rank is the identity, the mean included. Results that have a place of
    their own are copied there in the current stream of the tensors' device.

    A `send` or `recv` is an error: there is nobody to send to.
    """

    def __init__(self) -> None:
        super().__init__(0, 1)

    # ---- what replaces its argument ----------------------------------------------------------

    def allreduce(self, tensors: Any, opts: Any = None) -> _Done:
        """Leave the tensors as they are."""
        return _Done()

    allreduce_coalesced = broadcast = reduce = allreduce

    def barrier(self, opts: Any = None) -> _Done:
        """Wait for nobody."""
        return _Done()

    # ---- from sources to results ---------------------------------------------------------------

    def _allgather_base(self, output: Tensor, source: Tensor, *rest: Any) -> _Done:
        """Copy one buffer."""
        _copy(output, source)
        return _Done()

    def allgather(self, outputs: Any, sources: Any, opts: Any = None) -> _Done:
        """Copy each tensor to the one place of its list."""
        for (output,), source in zip(outputs, sources, strict=True):
            _copy(output, source)
        return _Done()

    def allgather_into_tensor_coalesced(
        self, outputs: Sequence[Tensor], sources: Sequence[Tensor], opts: Any = None
    ) -> _Done:
        """Copy several buffers."""
        for output, source in zip(outputs, sources, strict=True):
            _copy(output, source)
        return _Done()

    def reduce_scatter(self, outputs: Any, sources: Any, opts: Any = None) -> _Done:
        """Copy the one tensor of each list."""
        for output, (source,) in zip(outputs, sources, strict=True):
            _copy(output, source)
        return _Done()

    def scatter(self, outputs: Any, sources: Any, opts: Any = None) -> _Done:
        """Copy the one tensor of each list."""
        return self.reduce_scatter(outputs, sources, opts)

    gather = allgather
    alltoall = allgather_into_tensor_coalesced
    _reduce_scatter_base = alltoall_base = _allgather_base
    reduce_scatter_tensor_coalesced = allgather_into_tensor_coalesced
    # torch 2.13 calls the same collectives by other names.
    all_gather_single = reduce_scatter_single = all_to_all_single = _allgather_base
    all_gather_single_coalesced = allgather_into_tensor_coalesced
    reduce_scatter_single_coalesced = allgather_into_tensor_coalesced

    # ---- the group itself ----------------------------------------------------------------------

    def _start_coalescing(self, device: torch.device) -> None:
        """Begin a set of collectives; each ends when it is called."""

    def _end_coalescing(self, device: torch.device) -> _Done:
        """End the set."""
        return _Done()

    def getBackendName(self) -> str:
        """Return the name that errors and logs show."""
        return _NAME

    def shutdown(self) -> None:
        """Hold nothing that has to end."""

    abort = shutdown


def make_alone(rank: int) -> AloneGroup:
    """Return a group of this rank that ``torch.distributed`` knows until the job's groups end.

    Collectives: none. As with a group of several ranks, torch counts it when it names later groups,
    so every rank makes the same number of them at the same point.

    Args:
        rank: This process's rank in the job.
    """
    group = AloneGroup()
    world = distributed_c10d._world
    world.pg_map[group] = (_NAME, dist.HashStore())
    world.pg_names[group] = f"{_NAME}:{rank}:{len(world.pg_names)}"
    world.pg_group_ranks[group] = {rank: 0}
    world.pg_backend_config[group] = _NAME
    return group


def _copy(output: Tensor, source: Tensor) -> None:
    if output.data_ptr() != source.data_ptr():
        output.view(-1).copy_(source.reshape(-1))
