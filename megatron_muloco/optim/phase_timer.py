"""`PhaseTimer`: milliseconds of the optimizer's phases, measured without synchronising the device.

On an accelerator it takes the time between two events of the stream. Events are read as soon as
they have passed, so that few are alive however rarely `PhaseTimer.take` is called.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function

__all__ = ["PhaseTimer"]


class PhaseTimer:
    """Sums the milliseconds of named phases; phases do not overlap.

    Args:
        device: Where the phases' work is done.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._on_stream = torch.device(device).type == "cuda"
        self._milliseconds: dict[str, float] = {}
        self._events: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to phase ``name``, a span ``muloco/<name>`` of a profile."""
        # A host clock would time the launches of an accelerator, not the work.
        if not self._on_stream:
            started = time.perf_counter()
            with record_function(f"muloco/{name}"):
                yield
            self._add(name, (time.perf_counter() - started) * 1e3)
            return
        # The events are on the stream that the phase works on. Waiting for a collective makes this
        # stream wait, so the phase includes what is not hidden of the network's time.
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        with record_function(f"muloco/{name}"):
            yield
        end.record()
        self._events.append((name, begin, end))
        # Events of a stream pass in the order in which they were recorded, so the first that has
        # not passed ends the loop. Reading a pair that has passed does not wait.
        while self._events and self._events[0][2].query():
            self._read_oldest()

    def take(self) -> dict[str, float]:
        """Return the milliseconds of each phase since the last call; waits for the accelerator."""
        if self._events:
            self._events[-1][2].synchronize()
        while self._events:
            self._read_oldest()
        taken, self._milliseconds = self._milliseconds, {}
        return taken

    def _read_oldest(self) -> None:
        name, begin, end = self._events.popleft()
        self._add(name, begin.elapsed_time(end))

    def _add(self, name: str, milliseconds: float) -> None:
        self._milliseconds[name] = self._milliseconds.get(name, 0.0) + milliseconds
