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

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import deepspeed.comm as dist
import torch
from torch import Tensor
from torch.distributed import ProcessGroup, get_process_group_ranks
from torch.profiler import record_function
from typing_extensions import TypeVar, override

from megatron_muloco.comm.chunking import all_reduce_length, even_chunk_length, ring_bytes
from megatron_muloco.comm.collectives import (
    BufferPool,
    DeviceWire,
    HostWire,
    Layout,
    Pending,
    Wire,
    gather_objects,
    sum_over,
)
from megatron_muloco.comm.in_process import InProcessGroup
from megatron_muloco.errors import SyncError
from megatron_muloco.outer.reducer import (
    Handle,
    Reduced,
    Reducer,
    ReductionStats,
    Residuals,
    Sizes,
)

__all__ = [
    "AllReduce",
    "ByPhases",
    "ChunkedAllReduce",
    "LaunchedMean",
    "OuterGroup",
    "OuterPeers",
    "PhasedReducer",
    "Phases",
    "ReplicaSum",
    "Stopwatch",
    "build_plain_reducer_for",
    "finish",
    "new_memory",
]


# ------------------------------------------------------------------------------------------
# Parts that all reducers share.


OuterPeers = ProcessGroup | InProcessGroup | None
"""An outer group, in replica order; ``None`` for a single replica."""


class OuterGroup:
    """This rank's outer group: its members, the wire between them, and errors that name them.

    Attributes:
        device: Device of the tensors.
        ranks: Global ranks of the members, in replica order.
        index: This rank's place among them.
        size: K, the number of members.
        sends_from: Device of the memory that the collectives read.
        wire: Collectives over the group.
        gather_objects: Function that returns the value that it is given of every member; all of
            them call it.

    Args:
        group: The outer group, in replica order; ``None`` for a single replica.
        device: Device of the tensors.
        through_host: Whether tensors are sent through host memory; the group's backend must then
            be one that sends from there.
    """

    def __init__(
        self, group: OuterPeers, device: torch.device, *, through_host: bool = False
    ) -> None:
        self.device = device
        self.sends_from = torch.device("cpu") if through_host else device
        self.wire: Wire
        self.gather_objects: Callable[[Any], list[Any]]
        if isinstance(group, InProcessGroup):
            self.ranks, self.index, self.size = group.ranks, group.index, group.size()
            self.wire, self.gather_objects = group, group.gather_objects
            return
        self.ranks = get_process_group_ranks(group) if group is not None else [0]
        self.index = dist.get_rank(group) if group is not None else 0
        self.size = len(self.ranks)
        self.wire = HostWire(group, device) if through_host else DeviceWire(group)
        self.gather_objects = partial(gather_objects, group)

    def row(self, weight: float, metadata: Tensor) -> Tensor:
        """Return ``[weight, metadata]`` of this replica, fp32, on the device of the tensors."""
        assert 0.0 <= weight <= 1.0, weight
        head = torch.tensor([weight], dtype=torch.float32)
        return torch.cat([head.to(metadata.device), metadata.float()]).to(self.device)

    @contextmanager
    def named_errors(self, verb: str, fragment: int, round_index: int) -> Iterator[None]:
        """Raise `SyncError` with round, fragment and ranks for a collective that fails inside."""
        try:
            yield
        except RuntimeError as error:
            raise SyncError(
                f"round {round_index}: the {verb} of fragment {fragment} failed on rank "
                f"{self.ranks[self.index]} of outer group {self.ranks}: {error}. A rank of that "
                "group ended or was late; the first error in its log is the cause."
            ) from error

    @contextmanager
    def named_values(self, what: str, fragment: int, round_index: int) -> Iterator[None]:
        """Add round, fragment and ranks to the `SyncError` of values that cannot be encoded."""
        try:
            yield
        except SyncError as error:
            raise SyncError(
                f"round {round_index}, fragment {fragment}, rank {self.ranks[self.index]} of "
                f"outer group {self.ranks}: {what} could not be encoded: {error}"
            ) from error


Phases = Generator[None, None, Reduced]
"""The work of a reduction after its launch; see `PhasedReducer.phases`."""

HandleT = TypeVar("HandleT", bound=Handle, default=Any)
"""The handles of one reducer."""

LaunchedT = TypeVar("LaunchedT", contravariant=True)


class _HasPhases(Protocol[LaunchedT]):
    def phases(self, handle: LaunchedT) -> Phases: ...


class PhasedReducer(Reducer[HandleT], Protocol[HandleT]):
    """A reducer whose work after the launch is divided into phases.

    Attributes:
        crossings: Number of collectives that follow each other, the one of `launch` included.
    """

    crossings: int

    @property
    def sends_from(self) -> torch.device:
        """Device of the memory that the collectives read."""

    def phases(self, handle: HandleT) -> Phases:
        """Finish the reduction; a generator that returns the weighted mean.

        It yields once after each collective that it starts. So everything up to a ``yield`` needs
        only the collective before it, and other work may be done in between.

        Raises:
            SyncError: As `Reducer.wait`.
        """


class ByPhases:
    """The methods of a `PhasedReducer` that most reducers share.

    Args:
        outer: The outer group.
    """

    crossings = 1

    def __init__(self, outer: OuterGroup) -> None:
        self._outer = outer

    @property
    def sends_from(self) -> torch.device:
        """See `PhasedReducer.sends_from`."""
        return self._outer.sends_from

    def memory(self, sizes: Sizes, metadata_count: int) -> dict[str, Tensor]:
        """See `Reducer.memory`: new memory."""
        return new_memory(sizes, self._outer.device)

    def advance(self, handle: object) -> None:
        """Do nothing: all phases are left to `wait`; see `Reducer.advance`."""

    def wait(self: _HasPhases[Any], handle: Any) -> Reduced:
        """See `Reducer.wait`."""
        return finish(self.phases(handle))


def new_memory(sizes: Sizes, device: torch.device) -> dict[str, Tensor]:
    """Return flat fp32 tensors with undefined contents."""
    return {name: torch.empty(size, device=device) for name, size in sizes.items()}


def finish(phases: Phases) -> Reduced:
    """Execute the phases that are left, one directly after the other, and return the mean."""
    try:
        while True:
            next(phases)
    except StopIteration as end:
        reduced: Reduced = end.value
        return reduced


class Stopwatch:
    """Host time by activity. On an accelerator it is a lower bound: work is only queued there.

    Each activity is a span ``muloco/<activity>`` of a profile.
    """

    def __init__(self) -> None:
        self._ms: dict[str, float] = {}

    @contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        """Add the time spent in the ``with`` block to the activity."""
        started = time.perf_counter()
        try:
            with record_function(f"muloco/{activity}"):
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
    group: OuterPeers,
    device: torch.device,
    *,
    wire_dtype: WireDtype = "fp32",
    deterministic: bool = False,
    through_host: bool = False,
) -> PhasedReducer:
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


@dataclass(frozen=True, slots=True)
class LaunchedMean:
    """An uncompressed reduction in progress.

    Attributes:
        fragment: Index of the fragment.
        round_index: Round of the launch.
        layout: Names and sizes of the tensors.
        metadata_count: fp32 metadata values of a replica.
        buffers: Pooled buffers; the network reads and writes them until the end of `wait`.
        pending: The collective.
    """

    fragment: int
    round_index: int
    layout: Layout
    metadata_count: int
    buffers: tuple[Tensor, ...]
    pending: Pending


class _WithoutResiduals:
    """The residual methods of a reducer that loses nothing and so keeps nothing."""

    residual_names: tuple[str, ...] = ()

    def forget_residual(self) -> None:
        """Do nothing; see `Reducer.forget_residual`."""

    def residuals(self, fragments: Sequence[Sizes]) -> Residuals:
        """Return no residuals; see `Reducer.residuals`."""
        return {}

    def load_residuals(self, residuals: Residuals, fragments: Sequence[Sizes]) -> None:
        """Ignore residuals of an earlier, compressed run; see `Reducer.load_residuals`."""


@dataclass(frozen=True, slots=True)
class _Prepared:
    """The buffer of the next launch, and its parts, which the caller fills."""

    tensors: dict[str, Tensor]
    buffer: Tensor


class AllReduce(ByPhases, _WithoutResiduals):
    """fp32 mean by one all-reduce; the default.

    Args:
        group: The outer group, in replica order; ``None`` for a single replica.
        device: Device of the tensors.
        through_host: Whether tensors are sent through host memory.

    Collectives: `launch` starts an all-reduce (sum) over the outer group, `wait` finishes it.
    Wire bytes per rank: ``2 * (K - 1) / K`` of the padded buffer, as a ring sends them.
    """

    returns_views = True

    def __init__(
        self, group: OuterPeers, device: torch.device, *, through_host: bool = False
    ) -> None:
        super().__init__(OuterGroup(group, device, through_host=through_host))
        self._pool = BufferPool(device)
        self._prepared: _Prepared | None = None

    @override
    def memory(self, sizes: Sizes, metadata_count: int) -> dict[str, Tensor]:
        """See `Reducer.memory`: views of the buffer that is sent."""
        layout = Layout(tuple(sizes.items()))
        buffer = self._acquire(layout, 1 + metadata_count)
        self._prepared = _Prepared(layout.unpack(buffer), buffer)
        return self._prepared.tensors

    def launch(
        self,
        fragment: int,
        tensors: Mapping[str, Tensor],
        weight: float,
        metadata: Tensor,
        *,
        round_index: int,
    ) -> LaunchedMean:
        """See `Reducer.launch`."""
        outer, layout = self._outer, Layout.of(tensors)
        # 1. Fill the buffer: weighted tensors, and this replica's row among zeros.
        row = outer.row(weight, metadata)
        buffer = self._filled(layout, tensors, row.numel())
        values, rest = buffer[: layout.numel], buffer[layout.numel :]
        # A replica of weight 0 sends zeros, not ``0 * tensors``: its tensors may hold NaN, and
        # 0 * NaN is NaN.
        if weight:
            values *= weight
        else:
            values.zero_()
        rest.zero_()
        start = outer.index * row.numel()
        rest[start : start + row.numel()] = row
        # 2. Start the sum.
        with outer.named_errors("launch", fragment, round_index):
            pending = outer.wire.all_reduce(buffer)
        return LaunchedMean(fragment, round_index, layout, metadata.numel(), (buffer,), pending)

    def _filled(self, layout: Layout, tensors: Mapping[str, Tensor], row: int) -> Tensor:
        """Return a buffer that begins with the tensors."""
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            if prepared.tensors is tensors:
                return prepared.buffer
            self._pool.release(prepared.buffer)
        buffer = self._acquire(layout, row)
        layout.pack(tensors, buffer)
        return buffer

    def _acquire(self, layout: Layout, row: int) -> Tensor:
        size = all_reduce_length(layout.numel, self._outer.size, row)
        return self._pool.acquire(size, torch.float32)

    def phases(self, handle: LaunchedMean) -> Phases:
        """See `PhasedReducer.phases`."""
        yield from ()  # a generator, though `launch` has started the only collective
        outer, layout = self._outer, handle.layout
        (buffer,) = handle.buffers
        # 3. Finish the sum.
        with outer.named_errors("apply", handle.fragment, handle.round_index):
            handle.pending.wait()
        # 4. Divide by the weights, which the sum has delivered too.
        columns = 1 + handle.metadata_count
        rows = buffer[layout.numel : layout.numel + outer.size * columns]
        rows = rows.view(outer.size, columns).cpu()
        _divide(buffer[: layout.numel], rows)
        # The mean stays readable in the released buffer until the next launch (`returns_views`).
        self._pool.release(buffer)
        sent = ring_bytes(buffer.numel(), outer.size)
        return Reduced(layout.unpack(buffer), _plain_stats(rows, layout, sent))


class ChunkedAllReduce(ByPhases, _WithoutResiduals):
    """Mean by an all-to-all, a sum at the owner of each chunk, and an all-gather.

    The owner adds neighbours pairwise in replica order. So the sum of K equal values is exactly K
    times the value for every power of two. With ``wire_dtype`` bf16 the pseudogradients are rounded
    once and the mean once more; the owner uses the rounded mean like all other ranks.

    Args:
        group: The outer group, in replica order; ``None`` for a single replica.
        device: Device of the tensors.
        wire_dtype: Dtype of the values that are sent, fp32 or bf16.
        through_host: Whether tensors are sent through host memory.

    Collectives: `launch` starts an all-to-all over the outer group; the phases finish it and do an
    all-gather.
    Wire bytes per rank: ``K - 1`` messages of row and chunk, and ``K - 1`` chunks.
    """

    crossings = 2

    def __init__(
        self,
        group: OuterPeers,
        device: torch.device,
        *,
        wire_dtype: torch.dtype,
        through_host: bool = False,
    ) -> None:
        super().__init__(OuterGroup(group, device, through_host=through_host))
        self._pool = BufferPool(device)
        self._wire_dtype = wire_dtype
        self.returns_views = wire_dtype == torch.float32  # others are converted into new memory

    def launch(
        self,
        fragment: int,
        tensors: Mapping[str, Tensor],
        weight: float,
        metadata: Tensor,
        *,
        round_index: int,
    ) -> LaunchedMean:
        """See `Reducer.launch`."""
        outer, layout = self._outer, Layout.of(tensors)
        # 1. Lay the tensors end to end, in the dtype of the wire.
        chunk = even_chunk_length(layout.numel, outer.size)
        values = self._pool.acquire(outer.size * chunk, self._wire_dtype)
        values.zero_()  # not 0 * tensors for weight 0: see `AllReduce.launch`
        if weight:
            layout.pack(tensors, values)
        # 2. Write one message [row | chunk k] for each owner.
        row = outer.row(weight, metadata).view(torch.uint8)
        message_bytes = row.numel() + chunk * values.element_size()
        messages = self._pool.acquire(outer.size * message_bytes, torch.uint8)
        table = messages.view(outer.size, message_bytes)
        table[:, : row.numel()] = row
        table[:, row.numel() :] = values.view(torch.uint8).view(outer.size, -1)
        # 3. Send chunk k to rank k.
        received = self._pool.acquire(messages.numel(), torch.uint8)
        splits = [message_bytes] * outer.size
        with outer.named_errors("launch", fragment, round_index):
            pending = outer.wire.all_to_all(
                received, messages, receive_splits=splits, send_splits=splits
            )
        buffers = (values, messages, received)
        return LaunchedMean(fragment, round_index, layout, metadata.numel(), buffers, pending)

    def phases(self, handle: LaunchedMean) -> Phases:
        """See `PhasedReducer.phases`."""
        outer, layout = self._outer, handle.layout
        values, messages, received = handle.buffers
        with outer.named_errors("apply", handle.fragment, handle.round_index):
            handle.pending.wait()
        # 4. Owner of a chunk: the weighted mean in fp32, summed in replica order.
        table = received.view(outer.size, -1)
        row_bytes = 4 * (1 + handle.metadata_count)
        rows = table[:, :row_bytes].contiguous().view(torch.float32).cpu()
        chunks = table[:, row_bytes:].view(self._wire_dtype)
        mean = _pairwise_sum(list((chunks.float() * rows[:, :1].to(chunks.device)).unbind()))
        _divide(mean, rows)
        # 5. Send the mean of the own chunk to all, from ``messages`` to ``values``: their contents
        # are no longer needed, and so nothing else is held while it is under way.
        own = messages[: mean.numel() * values.element_size()].view(self._wire_dtype).copy_(mean)
        del mean, chunks, table
        with outer.named_errors("apply", handle.fragment, handle.round_index):
            pending = outer.wire.all_gather(values, own)
        yield
        with outer.named_errors("apply", handle.fragment, handle.round_index):
            pending.wait()
        self._pool.release(*handle.buffers)
        sent = (messages.numel() + values.numel() * values.element_size()) // outer.size
        stats = _plain_stats(rows, layout, (outer.size - 1) * sent)
        return Reduced(layout.unpack(values.float()), stats)


def _plain_stats(rows: Tensor, layout: Layout, wire_bytes: int) -> ReductionStats:
    """Return the statistics of an uncompressed mean; ``rows`` is ``[K, 1 + metadata]``."""
    uncoded = ring_bytes(layout.numel, len(rows))
    return ReductionStats(rows[:, 0].clone(), rows[:, 1:].clone(), wire_bytes, uncoded)


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


# ------------------------------------------------------------------------------------------
# Sums inside a replica.


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
        return sum_over(self._group, tensor)
