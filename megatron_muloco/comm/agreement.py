"""Collectives for control: small objects, small sums, a barrier and the job's key-value store.

They serve start-up, checkpoints, evaluation and the stop request, never the data of an outer step.
All of them block. In each, every rank of the group must take part at the same point of the program:
a rank that stays away blocks the others until the group's time limit.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

__all__ = ["barrier", "broadcast_object", "gather_objects", "job_store", "sum_over"]

Value = TypeVar("Value")


def gather_objects(group: ProcessGroup | None, value: Value) -> list[Value]:
    """Return the ``value`` of every rank of ``group``, in the order of its ranks.

    Args:
        group: A process group; ``None`` for the whole job.
        value: Any picklable object; ranks may give objects of different sizes.

    Collectives: an all-gather of the sizes and one of the pickled values over ``group``; each rank
    receives group size times the bytes of the largest value. Every rank of ``group`` calls it.
    """
    gathered: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(gathered, value, group=group)
    return gathered


def broadcast_object(value: Value) -> Value:
    """Return rank 0's ``value`` on every rank of the job.

    Args:
        value: Any picklable object on rank 0; ignored on other ranks.

    Collectives: a broadcast of the size and one of the pickled value over the job; every rank of
    the job calls it.
    """
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


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


def barrier() -> None:
    """Return when every rank of the job has called it."""
    torch.distributed.barrier()


def job_store() -> Any:
    """Return the job's rendezvous store: keys and values that ranks exchange without a collective.

    torch gives no public access to it. A second store would need a second port.
    """
    return torch.distributed.distributed_c10d._get_default_store()
