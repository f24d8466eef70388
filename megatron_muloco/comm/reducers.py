"""Uncompressed weighted means over the outer group, with two patterns of traffic.

`AllReduce` sums one flat fp32 buffer with the library's all-reduce::

    [ w * tensors | row 0 | row 1 | ... | row K-1 | padding ]    row k = [w_k, metadata of k]

Every replica fills its own row and leaves zeros in the others, so the same sum delivers all
weights and metadata.

`ChunkedAllReduce` cuts the fragment into K chunks. Rank k of the group receives chunk k of every
replica, sums in fp32 in a fixed order and sends the mean to all::

    all-to-all   [row | chunk 0] [row | chunk 1] ... [row | chunk K-1]      bytes, one for each rank
    all-gather   mean of chunk k

Both give bitwise equal results on all ranks of the group. The second one gives the same bits in
every run and on any network, and can send bf16.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import deepspeed.comm as dist
import torch
from torch import Tensor
from torch.distributed import ProcessGroup, get_process_group_ranks

from megatron_muloco.comm.chunking import uncoded_wire_bytes
from megatron_muloco.comm.collectives import BufferPool, DeviceWire, HostWire, Layout, Pending, Wire
from megatron_muloco.errors import SyncError
from megatron_muloco.outer.reducer import Reduced, Reducer, ReductionStats, Residuals, Sizes

__all__ = [
    "AllReduce",
    "ChunkedAllReduce",
    "OuterGroupReducer",
    "ReplicaSum",
    "Stopwatch",
    "build_plain_reducer_for",
]


# ------------------------------------------------------------------------------------------
# Parts that all reducers share.


class OuterGroupReducer:
    """Base of all reducers: the outer group, its wire, its buffers. It keeps no residuals.

    Args:
        group: The outer group, in replica order; ``None`` for a single replica.
        device: Device of the tensors.
        through_host: Whether tensors are sent through host memory; the group's backend must then
            be one that sends from there.
    """

    residual_names: tuple[str, ...] = ()
    returns_views = True

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

    def _row(self, weight: float, metadata: Tensor) -> Tensor:
        assert 0.0 <= weight <= 1.0, weight
        head = torch.tensor([weight], dtype=torch.float32)
        return torch.cat([head.to(metadata.device), metadata.float()]).to(self._device)

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
    """Host time by activity. On an accelerator it is a lower bound: work is only queued there."""

    def __init__(self) -> None:
        self._ms: dict[str, float] = {}

    @contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        """Add the time spent in the ``with`` block to the activity."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._ms[activity] = self[activity] + (time.perf_counter() - started) * 1e3

    def __getitem__(self, activity: str) -> float:
        """Return the milliseconds of an activity."""
        return self._ms.get(activity, 0.0)


# ------------------------------------------------------------------------------------------
# Uncompressed means.

WireDtype = Literal["fp32", "bf16"]


def build_plain_reducer_for(
    group: ProcessGroup | None,
    device: torch.device,
    *,
    wire_dtype: WireDtype = "fp32",
    deterministic: bool = False,
    through_host: bool = False,
) -> Reducer:
    """Return the reducer for uncompressed means.

    Args:
        group: The outer group, in replica order; ``None`` for a single replica.
        device: Device of the tensors.
        wire_dtype: Dtype of the values that are sent; sums are fp32 in any case.
        deterministic: Whether the result has the same bits for any network, library and order of
            arrival. An all-reduce is bitwise equal over ranks, but the library chooses its order
            of summation.
        through_host: Whether tensors are sent through host memory.
    """
    if wire_dtype == "bf16" or deterministic:
        # Not an all-reduce in bf16: gloo would round the partial sum at every hop.
        dtype = torch.bfloat16 if wire_dtype == "bf16" else torch.float32
        return ChunkedAllReduce(group, device, wire_dtype=dtype, through_host=through_host)
    return AllReduce(group, device, through_host=through_host)


class ReplicaSum:
    """Sums a small tensor over all ranks of a replica, for norms and the guard.

    Args:
        group: All ranks of one replica.

    Collectives: a blocking all-reduce over ``group``; all its ranks call it in the same order.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the sum over the group, bitwise equal on all its ranks, in a new tensor."""
        total = tensor.clone()
        if dist.get_world_size(self._group) > 1:
            dist.all_reduce(total, group=self._group)
        return total


@dataclass(frozen=True, slots=True)
class _Launched:
    """A reduction in progress: what `wait` needs, and what an error message names."""

    fragment: int
    round_index: int
    layout: Layout
    metadata_count: int
    buffers: tuple[Tensor, ...]
    pending: Pending


class AllReduce(OuterGroupReducer):
    """fp32 mean by one all-reduce; the default.

    Collectives: `launch` starts an all-reduce (sum) over the outer group, `wait` finishes it.
    Wire bytes per rank: ``2 * (K - 1) / K`` of the padded buffer, as a ring sends them.
    """

    def launch(
        self,
        fragment: int,
        tensors: Mapping[str, Tensor],
        weight: float,
        metadata: Tensor,
        *,
        round_index: int,
    ) -> _Launched:
        """See `Reducer.launch`."""
        layout = Layout.of(tensors)
        row = self._row(weight, metadata)
        size = _round_up(layout.numel + self._size * row.numel(), self._size)
        buffer = self._pool.acquire(size, torch.float32)
        # A replica of weight 0 sends zeros, not ``0 * tensors``: its tensors may hold NaN, and
        # 0 * NaN is NaN.
        buffer.zero_()
        if weight:
            layout.pack(tensors, buffer)
            buffer[: layout.numel] *= weight
        start = layout.numel + self._index * row.numel()
        buffer[start : start + row.numel()] = row
        with self._named_errors("launch", fragment, round_index):
            pending = self._wire.all_reduce(buffer)
        return _Launched(fragment, round_index, layout, metadata.numel(), (buffer,), pending)

    def wait(self, handle: Any) -> Reduced:
        """See `Reducer.wait`."""
        assert isinstance(handle, _Launched)
        (buffer,) = handle.buffers
        with self._named_errors("apply", handle.fragment, handle.round_index):
            handle.pending.wait()
        numel, columns = handle.layout.numel, 1 + handle.metadata_count
        rows = buffer[numel : numel + self._size * columns].view(self._size, columns).cpu()
        _divide(buffer[:numel], rows)
        self._pool.release(buffer)
        wire_bytes = uncoded_wire_bytes(buffer.numel(), self._size)
        uncoded = uncoded_wire_bytes(numel, self._size)
        stats = ReductionStats(rows[:, 0].clone(), rows[:, 1:].clone(), wire_bytes, uncoded)
        return Reduced(handle.layout.unpack(buffer), stats)


class ChunkedAllReduce(OuterGroupReducer):
    """Mean by an all-to-all, a sum at the owner of each chunk, and an all-gather.

    The owner adds neighbours pairwise in replica order. So the sum of K equal values is exactly K
    times the value for every power of two. With ``wire_dtype`` bf16 the pseudogradients are rounded
    once and the mean once more; the owner uses the rounded mean like all other ranks.

    Args:
        group: The outer group, in replica order; ``None`` for a single replica.
        device: Device of the tensors.
        wire_dtype: Dtype of the values that are sent, fp32 or bf16.
        through_host: Whether tensors are sent through host memory.

    Collectives: `launch` starts an all-to-all over the outer group; `wait` finishes it and does a
    blocking all-gather.
    Wire bytes per rank: ``K - 1`` messages of row and chunk, and ``K - 1`` chunks.
    """

    def __init__(
        self,
        group: ProcessGroup | None,
        device: torch.device,
        *,
        wire_dtype: torch.dtype,
        through_host: bool = False,
    ) -> None:
        super().__init__(group, device, through_host=through_host)
        self._wire_dtype = wire_dtype
        self.returns_views = (
            wire_dtype == torch.float32
        )  # other dtypes are converted to fp32, into new memory

    def launch(
        self,
        fragment: int,
        tensors: Mapping[str, Tensor],
        weight: float,
        metadata: Tensor,
        *,
        round_index: int,
    ) -> _Launched:
        """See `Reducer.launch`."""
        layout = Layout.of(tensors)
        row = self._row(weight, metadata).view(torch.uint8)
        # Chunks have an even number of values, so that the fp32 row of the next message stays
        # aligned to 4 bytes behind bf16 values.
        chunk = _round_up(math.ceil(layout.numel / self._size), 2)
        values = self._pool.acquire(self._size * chunk, self._wire_dtype)
        values.zero_()  # not 0 * tensors for weight 0: see `AllReduce.launch`
        if weight:
            layout.pack(tensors, values)
        chunk_bytes = chunk * values.element_size()
        payloads = self._pool.acquire(self._size * (row.numel() + chunk_bytes), torch.uint8)
        table = payloads.view(self._size, -1)
        table[:, : row.numel()] = row
        table[:, row.numel() :] = values.view(torch.uint8).view(self._size, -1)
        received = self._pool.acquire(payloads.numel(), torch.uint8)
        splits = [table.shape[1]] * self._size
        with self._named_errors("launch", fragment, round_index):
            pending = self._wire.all_to_all(
                received, payloads, receive_splits=splits, send_splits=splits
            )
        buffers = (values, payloads, received)
        return _Launched(fragment, round_index, layout, metadata.numel(), buffers, pending)

    def wait(self, handle: Any) -> Reduced:
        """See `Reducer.wait`."""
        assert isinstance(handle, _Launched)
        values, payloads, received = handle.buffers
        with self._named_errors("apply", handle.fragment, handle.round_index):
            handle.pending.wait()
        table = received.view(self._size, -1)
        row_bytes = 4 * (1 + handle.metadata_count)
        rows = table[:, :row_bytes].contiguous().view(torch.float32).cpu()
        chunks = table[:, row_bytes:].view(self._wire_dtype)
        mean = _pairwise_sum(list((chunks.float() * rows[:, :1].to(chunks.device)).unbind()))
        _divide(mean, rows)
        with self._named_errors("apply", handle.fragment, handle.round_index):
            self._wire.all_gather(values, mean.to(self._wire_dtype)).wait()
        self._pool.release(*handle.buffers)
        uncoded = uncoded_wire_bytes(handle.layout.numel, self._size)
        sent = payloads.numel() // self._size + mean.numel() * values.element_size()
        wire_bytes = (self._size - 1) * sent
        stats = ReductionStats(rows[:, 0].clone(), rows[:, 1:].clone(), wire_bytes, uncoded)
        return Reduced(handle.layout.unpack(values.float()), stats)


def _divide(total: Tensor, rows: Tensor) -> None:
    """Divide a weighted sum by the sum of weights, in place; without any weight it stays zero."""
    weight_sum = float(rows[:, 0].sum())
    if weight_sum:
        total.div_(weight_sum)


def _pairwise_sum(terms: list[Tensor]) -> Tensor:
    """Return the sum of ``terms``, adding neighbours until one term is left."""
    while len(terms) > 1:
        odd = terms[-1:] if len(terms) % 2 else []
        terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)] + odd
    return terms[0]


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
