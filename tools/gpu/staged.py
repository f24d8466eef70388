"""`staged`: a backend of torch.distributed that carries tensors through host memory over gloo.

NCCL refuses two ranks on one device. With this backend several ranks share one, and their groups,
streams, events and lifetimes are those of CUDA tensors. On tensors in host memory it works the same
way, so a machine without a GPU runs it too, and gives the bits of gloo.

It is used by `tools/gpu/several.py` and by tests, never by a training run. A process asks for it by
initialising the default group before the program does; `start_distributed` adopts that group::

    from tools.gpu import staged

    staged.register()
    torch.distributed.init_process_group("staged", store=..., rank=..., world_size=...)

What it does with one collective, as close to NCCL as host memory allows:

- The call returns at once. A thread of the group carries its collectives one after the other.
- Sources are read late: on a side stream that waits for the kernels launched before the call, and
  after ``delay`` seconds. A caller that overwrites them before `Work.wait` changes the result.
- ``Work.wait`` returns once the result is on its way to the device, and makes the current stream
  wait for it. Unlike with NCCL, the host waits for the peers there.
- Sends and receives do not wait for each other, as in one NCCL group call.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

__all__ = ["NAME", "StagedGroup", "StagedWork", "register"]

NAME = "staged"
_CLOCK_HZ = 1.5e9  # of the counter behind torch.cuda._sleep, about: delays need no precision


def register(delay: float = 0.0) -> None:
    """Make ``staged`` known to torch.distributed.

    Args:
        delay: Seconds by which every collective reads its sources late, to show callers that do not
            wait. Groups that exist already keep theirs.
    """

    def make(
        store: Any, rank: int, size: int, timeout: timedelta = timedelta(minutes=5)
    ) -> StagedGroup:
        return StagedGroup(store, rank, size, timeout, delay=delay)

    dist.Backend.register_backend(NAME, make, devices=["cpu", "cuda"])


@dataclass
class _Call:
    """One collective to carry.

    Attributes:
        method: Its name in `ProcessGroup`.
        arguments: Its arguments; tensors and lists of tensors among them.
        reads: Positions of arguments that are sources.
        writes: Positions of arguments that receive results.
        device: The accelerator of the tensors; ``None`` for host memory.
        ready: Event behind which the sources are written; ``None`` in host memory.
    """

    method: str
    arguments: Sequence[Any]
    reads: Sequence[int]
    writes: Sequence[int]
    device: torch.device | None = None
    ready: torch.cuda.Event | None = None

    def tensors(self) -> list[Tensor]:
        """Return all tensors of the call."""
        places = sorted({*self.reads, *self.writes})
        return [tensor for place in places for tensor in _flat(self.arguments[place])]


def _flat(argument: Any) -> list[Tensor]:
    """Return the tensors of an argument: one, a list, or a list of lists."""
    if isinstance(argument, Tensor):
        return [argument]
    return [tensor for each in argument for tensor in _flat(each)]


def _like(argument: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return the argument with every tensor changed."""
    if isinstance(argument, Tensor):
        return change(argument)
    return [_like(each, change) for each in argument]


class StagedWork(dist.Work):
    """A collective in progress.

    Args:
        call: The collective; the work keeps its tensors alive until the result is written.
        carrier: The group's side stream and thread.
    """

    def __init__(self, call: _Call, carrier: "_Carrier") -> None:
        super().__init__()
        self._call: _Call | None = call
        self._device, self._carrier = call.device, carrier
        self._begun = threading.Event()
        self._lock = threading.Lock()
        self._inner: Any = None
        self._hosts: dict[int, Any] = {}
        self._error: BaseException | None = None
        self._written: torch.cuda.Event | None = None

    def begin(self) -> None:
        """Copy the sources to host memory and give them to gloo; the group's thread calls it."""
        call = self._call
        assert call is not None
        try:
            with torch.no_grad(), self._carrier.stream_of(call):
                self._carrier.delay(call)
                for place in {*call.reads, *call.writes}:
                    self._hosts[place] = _like(call.arguments[place], self._carrier.host_memory)
                for place in call.reads:
                    _copy(call.arguments[place], self._hosts[place])
                self._carrier.wait_for_copies(call)
                given = [self._hosts.get(i, each) for i, each in enumerate(call.arguments)]
                self._inner = getattr(self._carrier.gloo, call.method)(*given)
        except BaseException as error:  # noqa: BLE001 - the caller gets it from `wait`
            self._error, self._call = error, None
        finally:
            self._begun.set()

    def finish(self) -> None:
        """Wait for gloo and copy the result back, once."""
        with self._lock:
            call = self._call
            if call is None:
                return
            try:
                with torch.no_grad(), self._carrier.stream_of(call):
                    self._inner.wait()
                    for place in call.writes:
                        _copy(self._hosts[place], call.arguments[place])
                    self._written = self._carrier.mark(call)
            except BaseException as error:  # noqa: BLE001 - the caller gets it from `wait`
                self._error = error
            finally:
                self._call, self._inner, self._hosts = None, None, {}

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Return when the current stream may use the result; raise what went wrong."""
        self._begun.wait()
        self.finish()
        if self._error is not None:
            raise self._error
        if self._written is not None:
            torch.cuda.current_stream(self._device).wait_event(self._written)
        return True

    def synchronize(self) -> None:
        """Do what `wait` does."""
        self.wait()

    def is_completed(self) -> bool:
        """Return whether `wait` would not block on a peer."""
        inner = self._inner
        return self._begun.is_set() and (inner is None or bool(inner.is_completed()))

    def is_success(self) -> bool:
        """Return whether it has completed without an error."""
        return self.is_completed() and self._error is None


def _copy(source: Any, target: Any) -> None:
    for one, other in zip(_flat(source), _flat(target), strict=True):
        # `.data` has a version counter of its own: autograd must not see a change of a tensor that
        # it saved, as it does not with other backends.
        other.data.copy_(one.data, non_blocking=True)


@dataclass
class _Carrier:
    """The thread, the side stream and the gloo group of one staged group.

    Attributes:
        gloo: The group that carries host memory.
        late: Seconds by which sources are read late.
        streams: Side stream by device, made when first needed.
        tasks: Collectives in the order of their calls; ``None`` ends the thread.
    """

    gloo: ProcessGroup
    late: float
    streams: dict[torch.device, torch.cuda.Stream] = field(default_factory=dict)
    tasks: "queue.SimpleQueue[StagedWork | None]" = field(default_factory=queue.SimpleQueue)
    works: list[StagedWork] | None = None

    def serve(self) -> None:
        """Carry collectives until the group is shut down."""
        while (work := self.tasks.get()) is not None:
            call = work._call
            assert call is not None
            passes = call.method in ("send", "recv")
            del call
            work.begin()
            if not passes:  # collectives of one group run one after the other
                work.finish()
            del work  # it holds tensors, which would live until the next collective

    def stream_of(self, call: _Call) -> Any:
        """Return a context in which the side stream of the call is current."""
        return (
            nullcontext() if call.device is None else torch.cuda.stream(self.streams[call.device])
        )

    def start(self, call: _Call) -> StagedWork:
        """Queue a collective; the calling thread is the one that has launched its sources."""
        tensors = call.tensors()
        if any(not tensor.is_contiguous() for tensor in tensors):
            raise ValueError(f"{call.method}: tensors must be contiguous, as for NCCL")
        device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
        if device is not None:
            if device not in self.streams:
                self.streams[device] = torch.cuda.Stream(device)
            call.device, call.ready = device, torch.cuda.current_stream(device).record_event()
            for tensor in tensors:  # freed memory must not be reused before the copies are made
                tensor.record_stream(self.streams[device])
        work = StagedWork(call, self)
        if self.works is not None:
            self.works.append(work)
        self.tasks.put(work)
        return work

    def delay(self, call: _Call) -> None:
        """Hold the side stream, or this thread, until the sources may be read, and longer."""
        if call.device is None:
            time.sleep(self.late)
            return
        assert call.ready is not None
        self.streams[call.device].wait_event(call.ready)
        if self.late:
            torch.cuda._sleep(int(self.late * _CLOCK_HZ))

    def host_memory(self, tensor: Tensor) -> Tensor:
        """Return uninitialised host memory for a tensor, page-locked for one on a device."""
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)

    def wait_for_copies(self, call: _Call) -> None:
        """Block this thread until the sources are in host memory."""
        if call.device is not None:
            self.streams[call.device].synchronize()

    def mark(self, call: _Call) -> torch.cuda.Event | None:
        """Return an event behind the copies to the device."""
        return None if call.device is None else self.streams[call.device].record_event()


class _Together(dist.Work):
    """Several collectives that are waited for together."""

    def __init__(self, works: Sequence[StagedWork]) -> None:
        super().__init__()
        self._works = list(works)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait for all of them."""
        for work in self._works:
            work.wait()
        return True

    def is_completed(self) -> bool:
        """Return whether all have completed."""
        return all(work.is_completed() for work in self._works)


class StagedGroup(ProcessGroup):
    """A process group of the backend; torch.distributed calls its methods.

    Args:
        store: Rendezvous store of this group.
        rank: This process's place in the group.
        size: Processes of the group.
        timeout: Time limit of a collective.
        delay: Seconds by which sources are read late.
    """

    def __init__(
        self, store: Any, rank: int, size: int, timeout: timedelta, *, delay: float = 0.0
    ) -> None:
        super().__init__(rank, size)
        gloo = ProcessGroup(store, rank, size)
        gloo._set_default_backend(ProcessGroup.BackendType.GLOO)
        backend = dist.ProcessGroupGloo(store, rank, size, timeout=timeout)
        gloo._register_backend(torch.device("cpu"), ProcessGroup.BackendType.GLOO, backend)
        gloo._set_group_name(f"{NAME} {id(self)}")
        self._carrier = _Carrier(gloo, delay)
        # A daemon: with a dead peer it would keep the process alive until the time limit.
        thread = threading.Thread(target=self._carrier.serve, name=NAME, daemon=True)
        thread.start()

    def _start(self, name: str, *given: Any, reads: Sequence[int], writes: Sequence[int]) -> Any:
        return self._carrier.start(_Call(name, given, reads, writes))

    # ---- what replaces its argument ----------------------------------------------------------

    def allreduce(self, tensors: Any, opts: Any) -> StagedWork:
        """Sum, or another reduction, over the group."""
        return self._start("allreduce", tensors, opts, reads=(0,), writes=(0,))

    def allreduce_coalesced(self, tensors: Any, opts: Any) -> StagedWork:
        """Reduce several tensors."""
        return self._start("allreduce_coalesced", tensors, opts, reads=(0,), writes=(0,))

    def broadcast(self, tensors: Any, opts: Any) -> StagedWork:
        """Send one rank's tensor to all."""
        return self._start("broadcast", tensors, opts, reads=(0,), writes=(0,))

    def reduce(self, tensors: Any, opts: Any) -> StagedWork:
        """Reduce to one rank."""
        return self._start("reduce", tensors, opts, reads=(0,), writes=(0,))

    # ---- from sources to results ---------------------------------------------------------------

    def _allgather_base(self, output: Any, source: Any, opts: Any) -> StagedWork:
        """Gather one tensor of every rank in one buffer."""
        return self._start("_allgather_base", output, source, opts, reads=(1,), writes=(0,))

    def allgather(self, outputs: Any, sources: Any, opts: Any) -> StagedWork:
        """Gather one tensor of every rank in a list."""
        return self._start("allgather", outputs, sources, opts, reads=(1,), writes=(0,))

    def allgather_into_tensor_coalesced(
        self, outputs: Any, sources: Any, opts: Any = None
    ) -> StagedWork:
        """Gather several tensors."""
        given = (outputs, sources) if opts is None else (outputs, sources, opts)
        name = "allgather_into_tensor_coalesced"
        return self._start(name, *given, reads=(1,), writes=(0,))

    def _reduce_scatter_base(self, output: Any, source: Any, opts: Any) -> StagedWork:
        """Reduce a buffer and keep this rank's part."""
        return self._start("_reduce_scatter_base", output, source, opts, reads=(1,), writes=(0,))

    def reduce_scatter(self, outputs: Any, sources: Any, opts: Any) -> StagedWork:
        """Reduce a list of tensors and keep this rank's."""
        return self._start("reduce_scatter", outputs, sources, opts, reads=(1,), writes=(0,))

    def reduce_scatter_tensor_coalesced(
        self, outputs: Any, sources: Any, opts: Any = None
    ) -> StagedWork:
        """Reduce several buffers and keep this rank's parts."""
        given = (outputs, sources) if opts is None else (outputs, sources, opts)
        name = "reduce_scatter_tensor_coalesced"
        return self._start(name, *given, reads=(1,), writes=(0,))

    def alltoall_base(self, output: Any, source: Any, *rest: Any) -> StagedWork:
        """Exchange parts of a buffer."""
        return self._start("alltoall_base", output, source, *rest, reads=(1,), writes=(0,))

    def alltoall(self, outputs: Any, sources: Any, opts: Any) -> StagedWork:
        """Exchange lists of tensors."""
        return self._start("alltoall", outputs, sources, opts, reads=(1,), writes=(0,))

    def gather(self, outputs: Any, sources: Any, opts: Any) -> StagedWork:
        """Gather one tensor of every rank on one."""
        return self._start("gather", outputs, sources, opts, reads=(1,), writes=(0,))

    def scatter(self, outputs: Any, sources: Any, opts: Any) -> StagedWork:
        """Give every rank one of a rank's tensors."""
        return self._start("scatter", outputs, sources, opts, reads=(1,), writes=(0,))

    # torch 2.13 calls the same collectives by other names.
    all_gather_single = _allgather_base
    all_gather_single_coalesced = allgather_into_tensor_coalesced
    reduce_scatter_single = _reduce_scatter_base
    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced
    all_to_all_single = alltoall_base

    # ---- from rank to rank ---------------------------------------------------------------------

    def send(self, tensors: Any, to: int, tag: int = 0) -> StagedWork:
        """Send to a rank of the group."""
        return self._start("send", tensors, to, tag, reads=(0,), writes=())

    def recv(self, tensors: Any, source: int, tag: int = 0) -> StagedWork:
        """Receive from a rank of the group."""
        return self._start("recv", tensors, source, tag, reads=(), writes=(0,))

    def barrier(self, opts: Any = None) -> StagedWork:
        """Wait for all ranks and, as NCCL's barrier does, for this rank's kernels."""
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        return self._start("barrier", reads=(), writes=())

    # ---- the group itself ----------------------------------------------------------------------

    def _start_coalescing(self, device: torch.device) -> None:
        """Collect the collectives that follow, which start at once all the same."""
        self._carrier.works = []

    def _end_coalescing(self, device: torch.device) -> _Together:
        """Return one work for all since `_start_coalescing`."""
        works, self._carrier.works = self._carrier.works, None
        return _Together(works or ())

    def getBackendName(self) -> str:
        """Return the name under which the backend is registered."""
        return NAME

    def shutdown(self) -> None:
        """End the thread after what it was given."""
        self._carrier.tasks.put(None)

    abort = shutdown
