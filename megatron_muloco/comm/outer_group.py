"""What every reducer needs of the outer group: its ranks, wire, buffers, and named errors."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import deepspeed.comm as dist
import torch
from torch import Tensor
from torch.distributed import ProcessGroup, get_process_group_ranks

from megatron_muloco.comm.buffers import BufferPool
from megatron_muloco.comm.wire import DeviceWire, HostWire, Wire
from megatron_muloco.errors import SyncError
from megatron_muloco.outer.reducer import Residuals, Sizes

__all__ = ["OuterGroupReducer", "Stopwatch"]


class OuterGroupReducer:
    """What all reducers share; by itself it keeps nothing between rounds.

    Args:
        group: The outer group, in replica order; ``None`` for a single replica.
        device: Where the tensors are.
        through_host: Whether they travel through host memory; the group's backend then sends from
            there.
    """

    residual_kinds: tuple[str, ...] = ()
    lends = True

    def __init__(
        self, group: ProcessGroup | None, device: torch.device, *, through_host: bool = False
    ) -> None:
        self._device = device
        self._ranks = get_process_group_ranks(group) if group is not None else [0]
        self._index = dist.get_rank(group) if group is not None else 0
        self._size = len(self._ranks)
        self._wire: Wire = HostWire(group, device) if through_host else DeviceWire(group)
        self._pool = BufferPool(device)

    def forget_residual(self) -> None:
        """See `Reducer.forget_residual`."""

    def residuals(self, fragments: Sequence[Sizes]) -> Residuals:
        """See `Reducer.residuals`."""
        return {}

    def load_residuals(self, residuals: Residuals, fragments: Sequence[Sizes]) -> None:
        """See `Reducer.load_residuals`."""

    def _row(self, weight: float, riders: Tensor) -> Tensor:
        assert 0.0 <= weight <= 1.0, weight
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

    @contextmanager
    def _named_values(self, what: str, fragment: int, round_index: int) -> Iterator[None]:
        try:
            yield
        except SyncError as error:
            raise SyncError(
                f"round {round_index}, fragment {fragment}, rank {self._ranks[self._index]} of "
                f"outer group {self._ranks}: {what} could not be encoded: {error}"
            ) from error


class Stopwatch:
    """Host time by activity; on an accelerator, where work is only queued, a lower bound."""

    def __init__(self) -> None:
        self._ms: dict[str, float] = {}

    @contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        """Add the time inside to the activity."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._ms[activity] = self[activity] + (time.perf_counter() - started) * 1e3

    def __getitem__(self, activity: str) -> float:
        """Return the milliseconds of an activity."""
        return self._ms.get(activity, 0.0)
