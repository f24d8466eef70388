"""A reducer whose whole reduction runs beside training: in a thread, on a stream of its own.

A reduction with several phases (send, decode, average, encode, send again, decode) makes progress
only while somebody works on it. Here a communication thread does, so that an apply finds the result
ready. Launches run one after the other in the order in which they were made, which is the same on
all ranks of the outer group; that thread alone uses the reducer's communicator. After a failure it
does nothing more: the peers are still in the collectives of the launch that failed, and would take
those of the next one for them.
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
    """A reduction in the thread's queue or in its hands."""

    fragment: int
    future: "Future[tuple[Reduced, Any]]"


class BackgroundReducer:
    """Does what another reducer does, beside training; see `Reducer` for its calls.

    Args:
        reducer: Used by the communication thread alone from now on; its group too.
        device: Where the tensors are. On an accelerator the thread has a stream of its own, which
            starts a launch when the launching stream has produced its tensors, and the stream that
            waits goes on when the result is there. That branch has not been run on a GPU yet.
    """

    def __init__(self, reducer: Reducer, device: torch.device) -> None:
        self._reducer, self._device = reducer, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._failure: BaseException | None = None  # the first one; the thread's own
        self.residual_names, self.returns_views = reducer.residual_names, False
        # A daemon: a peer that is gone must not keep this process alive until the time limit.
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
        produced = self._mark()

        def reduce() -> tuple[Reduced, Any]:
            if self._stream is not None:
                self._stream.wait_event(produced)
            handle = self._reducer.launch(
                fragment, tensors, weight, metadata, round_index=round_index
            )
            return self._own(self._reducer.wait(handle)), self._mark()

        return _Launched(fragment, self._submit(reduce))

    def wait(self, handle: Any) -> Reduced:
        """See `Reducer.wait`."""
        assert isinstance(handle, _Launched)
        reduced, finished = handle.future.result()
        if self._stream is not None:
            code = reduced.stats.code
            squares = [] if code is None else [code.exact_square, code.lost_square]
            self._hand_over(finished, [*reduced.mean.values(), *squares])
        return reduced

    def forget_residual(self) -> None:
        """See `Reducer.forget_residual`."""
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
        """Return a mean that the next launch leaves alone: the thread may be at it already."""
        if not self._reducer.returns_views:
            return reduced
        own = {name: tensor.clone() for name, tensor in reduced.mean.items()}
        return Reduced(own, reduced.stats)

    def _submit(self, call: Callable[[], Result]) -> "Future[Result]":
        future: Future[Result] = Future()

        def task() -> None:
            try:
                if self._failure is not None:
                    raise self._failure
                future.set_result(call())
            # Whatever it is belongs to whoever waits for the result.
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
        """Let the current stream use what the thread's stream produced."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(finished)
        for tensor in tensors:
            tensor.record_stream(current)

    def _mark(self) -> Any:
        """Return an event after what the current stream was given so far; nothing on a CPU."""
        return None if self._stream is None else torch.cuda.current_stream().record_event()
