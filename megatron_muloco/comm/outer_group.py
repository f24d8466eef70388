"""What every reducer needs of the outer group: its ranks, buffers, and errors that name things."""

from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed.comm as dist
import torch
from torch import Tensor
from torch.distributed import ProcessGroup, Work, get_process_group_ranks

from megatron_muloco.comm.buffers import BufferPool
from megatron_muloco.errors import SyncError

__all__ = ["OuterGroupReducer", "finish"]


class OuterGroupReducer:
    """What all reducers share: the group, its size, the buffers, and errors that name things."""

    def __init__(self, group: ProcessGroup | None, device: torch.device) -> None:
        self._group, self._device = group, device
        self._ranks = get_process_group_ranks(group) if group is not None else [0]
        self._index = dist.get_rank(group) if group is not None else 0
        self._size = len(self._ranks)
        self._pool = BufferPool(device)

    def _row(self, weight: float, riders: Tensor) -> Tensor:
        assert weight in (0.0, 1.0), weight
        head = torch.tensor([weight], dtype=torch.float32)
        return torch.cat([head.to(riders.device), riders.float()]).to(self._device)

    @contextmanager
    def _named_errors(self, verb: str, fragment: int, round_index: int) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise SyncError(
                f"round {round_index}: the {verb} of fragment {fragment} failed on rank "
                f"{self._ranks[self._index]} of outer group {self._ranks}: {error}. A rank of that "
                "group ended or was late; the first error in its log is the cause."
            ) from error


def finish(work: Work | None) -> None:
    """Wait for a collective, if there is one."""
    # Only wait() raises: a failed operation counts as completed.
    if work is not None:
        work.wait()
