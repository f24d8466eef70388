"""`BackgroundReducer`: runs another reducer in a communication thread, beside training.

A reduction with several phases (send, decode, average, encode, send again, decode) advances only
while a thread executes it. Without this class the later phases would all run in `wait`, and an
overlapped apply would block for them. With it an apply usually finds the result ready::

    main thread     launch 0 | inner steps ............ | wait 0 | ...
    communication            | encode, send, average, send, decode |

Two rules keep the ranks of an outer group in step:

- One communicator, one thread. Ranks match collectives of a communicator by their order alone. The
  thread is the only user of the reducer's group (`Groups.exchange`), and runs launches in the order
  in which they were made, which is the same on all ranks.
- The first failure is final. See `BackgroundReducer._submit`.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_muloco.outer.reducer import Reduced, Reducer, Residuals, Sizes

__all__ = ["BackgroundReducer"]

Result = TypeVar("Result")


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
    """

    def __init__(self, reducer: Reducer, device: torch.device) -> None:
        self._reducer, self._device = reducer, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._failure: BaseException | None = None  # the first one; only the thread touches it
        self.residual_names, self.returns_views = reducer.residual_names, False
        # A daemon, because a thread that is blocked in a collective with a dead peer would keep
        # the process alive until the group's time limit.
        threading.Thread(target=self._work, name="outer communication", daemon=True).start()

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
        """Queue a call for the thread; its result or exception arrives in the future.

        After the first failure every later call fails with the same exception and is not executed.
        The peers are still in the collectives of the failed launch. They would match the
        collectives of the next launch with those, and average unrelated values without an error.
        """
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
