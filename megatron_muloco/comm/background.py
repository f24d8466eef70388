"""Reductions beside training: in a communication thread, or in steps of the main thread.

A reduction with several phases (send, decode, average, encode, send again, decode) advances only
while something executes it. By itself a reducer leaves all later phases to `wait`, and an
overlapped apply would block for them. `beside_training` chooses who executes them before that:

`BackgroundReducer`, for collectives that read host memory (gloo): a thread, from end to end::

    main thread     launch 0 | inner steps ............ | wait 0 | ...
    communication            | encode, send, average, send, decode |

`SteppedReducer`, for collectives that read the memory of an accelerator (NCCL): the main thread,
between two inner steps::

    main thread     launch 0 | inner steps | average, send | inner steps | wait 0 | ...

The rule behind the choice is that one thread talks to NCCL. Communicators share the queues of the
device, and collectives that two threads enqueue have no common order on all ranks: each rank could
wait for a collective that another has enqueued behind one that it waits for itself. The main thread
enqueues in the order of the program, which is the same on all ranks. A thread that talks to gloo
occupies no queue.

Two more rules keep the ranks of an outer group in step:

- One communicator, one thread. Ranks match collectives of a communicator by their order alone. The
  thread is the only user of the reducer's group (`Groups.exchange`), and runs launches in the order
  in which they were made, which is the same on all ranks.
- The first failure is final. The peers are still in the collectives of the failed launch. They
  would match the collectives of the next launch with those, and average unrelated values without an
  error. So every later call fails with the same exception, and executes nothing.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.profiler import record_function

from megatron_muloco.comm.reducers import PhasedReducer, Phases, finish, new_memory
from megatron_muloco.errors import RuntimeMismatch
from megatron_muloco.outer.reducer import Reduced, Reducer, Residuals, Sizes

__all__ = ["BackgroundReducer", "SteppedReducer", "beside_training"]

Result = TypeVar("Result")


def beside_training(reducer: PhasedReducer, device: torch.device, *, overlap_steps: int) -> Reducer:
    """Return ``reducer``, executed beside training in the way that suits its collectives.

    Args:
        reducer: The reducer to execute; from now on nobody else uses it.
        device: Device of the tensors.
        overlap_steps: Inner steps from a launch to its apply, at least 1.
    """
    if reducer.sends_from.type == "cpu":
        return BackgroundReducer(reducer, device)
    return SteppedReducer(reducer, overlap_steps=overlap_steps)


# ---- in a thread -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Launched:
    """A reduction that the thread has queued, is executing, or has finished."""

    fragment: int
    future: "Future[tuple[Reduced, Any]]"


class BackgroundReducer:
    """Runs the calls of another reducer in a thread of its own; see `Reducer` for their meaning.

    `launch` only queues the work and returns. `wait` blocks until the thread has finished it. The
    results never alias the other reducer's buffers (``returns_views`` is false).

    Args:
        reducer: The reducer to run. From now on only the communication thread may use it and its
            process group.
        device: Device of the tensors. On an accelerator the thread has its own stream; events
            order it after the launching stream, and the waiting stream after it.

    Raises:
        RuntimeMismatch: The collectives read the memory of an accelerator.
    """

    def __init__(self, reducer: PhasedReducer, device: torch.device) -> None:
        if reducer.sends_from.type != "cpu":
            raise RuntimeMismatch(
                f"a thread was to issue collectives on the memory of {reducer.sends_from}, while "
                "the main thread issues others there. Their order would differ from rank to rank, "
                "and the job could hang. Use SteppedReducer, or host transport."
            )
        self._reducer, self._device = reducer, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._failure: BaseException | None = None  # the first one; only the thread touches it
        self.residual_names, self.returns_views = reducer.residual_names, False
        # A daemon, because a thread that is blocked in a collective with a dead peer would keep
        # the process alive until the group's time limit.
        threading.Thread(target=self._work, name="outer communication", daemon=True).start()

    def memory(self, sizes: Sizes, metadata_count: int) -> dict[str, Tensor]:
        """See `Reducer.memory`: new memory, because only the thread uses the reducer's."""
        return new_memory(sizes, self._device)

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
        # The thread's stream may read the tensors only after the current stream has written them.
        produced = self._mark()

        def reduce() -> tuple[Reduced, Any]:
            if self._stream is not None:
                self._stream.wait_event(produced)
            handle = self._reducer.launch(
                fragment, tensors, weight, metadata, round_index=round_index
            )
            # Waiting here, directly after the launch, completes one reduction before the next one
            # starts: the reducer never has two in flight, and needs buffers for one only.
            return self._own(self._reducer.wait(handle)), self._mark()

        return _Launched(fragment, self._submit(reduce))

    def advance(self, handle: _Launched) -> None:
        """Do nothing: the thread advances by itself; see `Reducer.advance`."""

    def wait(self, handle: _Launched) -> Reduced:
        """See `Reducer.wait`."""
        reduced, finished = handle.future.result()
        if self._stream is not None:
            measured = [each.numbers for each in reduced.stats.measurements.values()]
            measured = [numbers for numbers in measured if numbers.is_cuda]
            self._hand_over(finished, [*reduced.mean.values(), *measured])
        return reduced

    def forget_residual(self) -> None:
        """See `Reducer.forget_residual`."""
        # Queued, not executed: launches made before this call still encode with the old residual.
        self._submit(self._reducer.forget_residual)

    def residuals(self, fragments: Sequence[Sizes]) -> Residuals:
        """See `Reducer.residuals`."""
        residuals, finished = self._submit(
            lambda: (self._reducer.residuals(fragments), self._mark())
        ).result()
        if self._stream is not None:
            self._hand_over(finished, [t for kind in residuals.values() for t in kind.values()])
        return residuals

    def load_residuals(self, residuals: Residuals, fragments: Sequence[Sizes]) -> None:
        """See `Reducer.load_residuals`."""
        self._submit(lambda: self._reducer.load_residuals(residuals, fragments)).result()

    def _own(self, reduced: Reduced) -> Reduced:
        """Return a mean that does not alias the reducer's buffers.

        The thread may start the next launch before anybody has read this result.
        """
        if not self._reducer.returns_views:
            return reduced
        own = {name: tensor.clone() for name, tensor in reduced.mean.items()}
        return Reduced(own, reduced.stats)

    def _submit(self, call: Callable[[], Result]) -> "Future[Result]":
        """Queue a call for the thread; its result or exception arrives in the future."""
        future: Future[Result] = Future()

        def task() -> None:
            try:
                if self._failure is not None:
                    raise self._failure
                future.set_result(call())
            # Any exception is raised again where the result is waited for.
            except BaseException as error:  # noqa: BLE001
                self._failure = self._failure or error
                future.set_exception(error)

        self._tasks.put(task)
        return future

    def _work(self) -> None:
        with torch.no_grad(), torch.cuda.stream(self._stream):  # no stream: does nothing
            while True:
                self._tasks.get()()

    def _hand_over(self, finished: Any, tensors: Iterable[Tensor]) -> None:
        """Make the current stream wait for the thread's stream, and keep the tensors' memory.

        ``record_stream`` tells the caching allocator that a second stream uses the memory, so that
        it is not reused while that stream still reads it.
        """
        current = torch.cuda.current_stream(self._device)
        current.wait_event(finished)
        for tensor in tensors:
            tensor.record_stream(current)

    def _mark(self) -> Any:
        """Return an event behind all work queued on the current stream; ``None`` on a CPU."""
        return None if self._stream is None else torch.cuda.current_stream().record_event()


# ---- in steps of the main thread ---------------------------------------------------------


@dataclass(slots=True)
class _Stepped:
    """A launched reduction.

    Attributes:
        fragment: Index of the fragment.
        phases: The phases that are left.
        age: Inner steps since the launch.
        executed: Number of phases executed.
    """

    fragment: int
    phases: Phases
    age: int = 0
    executed: int = 0


class SteppedReducer:
    """Executes the phases of another reducer between inner steps; see `Reducer` for the calls.

    Every collective is issued by the caller's thread. The crossings of a reduction get equal shares
    of the overlap: with two of them and an overlap of 6 steps, the second one begins 3 steps after
    the launch. With an overlap of 1 step there is no step between launch and apply, and the second
    crossing is part of `wait`. Which phases are executed depends on the number of `advance` calls
    alone, so that all ranks issue the same collectives at the same place of the program, whatever
    has arrived; a phase whose data has not arrived waits for it.

    Phases compute on the current stream. Results alias the other reducer's buffers where its own
    results do.

    Args:
        reducer: The reducer to execute; from now on nobody else uses it.
        overlap_steps: Inner steps from a launch to its apply, at least 1.
    """

    def __init__(self, reducer: PhasedReducer, *, overlap_steps: int) -> None:
        assert overlap_steps > 0, overlap_steps
        self._reducer, self._overlap_steps = reducer, overlap_steps
        self._failure: BaseException | None = None  # the first one
        self.residual_names, self.returns_views = reducer.residual_names, reducer.returns_views

    def memory(self, sizes: Sizes, metadata_count: int) -> dict[str, Tensor]:
        """See `Reducer.memory`."""
        return self._reducer.memory(sizes, metadata_count)

    def launch(
        self,
        fragment: int,
        tensors: Mapping[str, Tensor],
        weight: float,
        metadata: Tensor,
        *,
        round_index: int,
    ) -> _Stepped:
        """See `Reducer.launch`."""
        with self._first_failure_is_final():
            handle = self._reducer.launch(
                fragment, tensors, weight, metadata, round_index=round_index
            )
            return _Stepped(fragment, self._reducer.phases(handle))

    def advance(self, handle: _Stepped) -> None:
        """Execute the phases that are due; see `Reducer.advance`."""
        handle.age += 1
        crossings = self._reducer.crossings
        # The last phase starts no collective; it is left to `wait`.
        due = min(handle.age * crossings // self._overlap_steps, crossings - 1)
        while handle.executed < due:
            with self._first_failure_is_final(), record_function("muloco/advance"):
                next(handle.phases)
            handle.executed += 1

    def wait(self, handle: _Stepped) -> Reduced:
        """See `Reducer.wait`."""
        with self._first_failure_is_final():
            return finish(handle.phases)

    def forget_residual(self) -> None:
        """See `Reducer.forget_residual`; launches made so far have encoded with it."""
        with self._first_failure_is_final():
            self._reducer.forget_residual()

    def residuals(self, fragments: Sequence[Sizes]) -> Residuals:
        """See `Reducer.residuals`."""
        with self._first_failure_is_final():
            return self._reducer.residuals(fragments)

    def load_residuals(self, residuals: Residuals, fragments: Sequence[Sizes]) -> None:
        """See `Reducer.load_residuals`."""
        with self._first_failure_is_final():
            self._reducer.load_residuals(residuals, fragments)

    @contextmanager
    def _first_failure_is_final(self) -> Iterator[None]:
        if self._failure is not None:
            raise self._failure
        try:
            yield
        except BaseException as error:
            self._failure = error
            raise
