"""Time spent training: a clock that evaluation and saving can stop."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["TrainingClock"]


class TrainingClock:
    """Seconds since construction, without those inside `paused`.

    Args:
        now: Seconds, monotonic.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._started = now()
        self._paused_seconds = 0.0

    @property
    def seconds(self) -> float:
        """Training time so far."""
        return self._now() - self._started - self._paused_seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count what happens inside; not to be nested."""
        began = self._now()
        try:
            yield
        finally:
            self._paused_seconds += self._now() - began
