"""At which step does everybody stop?

Signals reach ranks at different moments, and replicas are at different steps between two outer
steps. No collective may cross replicas there, so they agree through the job's rendezvous store:

1. A replica that wants to stop raises ``requested``. All replicas look at it once a step.
2. Each then posts the last step it has finished and waits for the others to post.
3. Everybody stops after the largest posted step + 1: the extra step is the one in which a leader's
   decision travels to the other ranks of its replica.

Waiting must not hang a replica that others wait for in an outer step. So a replica announces the
step of an outer step before it enters it, and a waiting replica that sees such an announcement
ahead of itself trains on until it has passed that outer step, and posts again there. Nobody can be
further ahead than that outer step, so all see the same largest post.
"""

import signal
import time
from types import FrameType, TracebackType
from typing import Protocol

__all__ = ["StopAgreement", "StopRequest", "Store"]

_POLL_SECONDS = 0.02
_PREFIX = "muloco-stop"  # every start of a job has a store of its own


class Store(Protocol):
    """The part of a torch rendezvous store that is used."""

    def set(self, key: str, value: str) -> object:
        """Write ``value``."""

    def get(self, key: str) -> bytes:
        """Return a value that exists."""

    def check(self, keys: list[str]) -> bool:
        """Whether all ``keys`` exist, without waiting."""


class StopAgreement:
    """One replica leader's view of the agreement.

    Args:
        store: Seen by the leaders of all replicas.
        replica: This replica's index.
        num_replicas: K.
    """

    def __init__(self, store: Store, *, replica: int, num_replicas: int) -> None:
        self._store = store
        self._replica = replica
        self._replicas = range(num_replicas)

    def request(self) -> None:
        """Ask all replicas to stop."""
        self._store.set(f"{_PREFIX}/requested", "1")

    def announce(self, step: int) -> None:
        """Say that this replica is about to wait for all others, after inner step ``step``."""
        self._store.set(f"{_PREFIX}/meeting/{self._replica}", str(step))

    def decide(self, step: int) -> int | None:
        """Return the step after which to stop, or ``None`` to train on.

        Called between steps, after inner step ``step`` and its outer steps. Waits while a decision
        is near and nobody waits for this replica.
        """
        if not self._store.check([f"{_PREFIX}/requested"]):
            return None
        self._store.set(f"{_PREFIX}/reached/{self._replica}", str(step))
        while True:
            # Meetings first: a replica that has decided may announce the next one at any moment,
            # but then everybody has posted, and the posts read after its announcement say so.
            awaited = any((ahead or 0) > step for ahead in self._numbers("meeting"))
            reached = [post for post in self._numbers("reached") if post is not None]
            if len(reached) == len(self._replicas):
                return max(reached) + 1
            if awaited:
                return None
            time.sleep(_POLL_SECONDS)

    def _numbers(self, kind: str) -> list[int | None]:
        """Return the number of each replica under ``kind``; ``None`` where there is none yet."""
        return [self._number(f"{_PREFIX}/{kind}/{replica}") for replica in self._replicas]

    def _number(self, key: str) -> int | None:
        return int(self._store.get(key)) if self._store.check([key]) else None


# ------------------------------------------------------------------------------------------
# A request to stop, from SLURM (SIGUSR1 before the time limit) or an operator (SIGTERM).


_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class StopRequest:
    """Remembers that a stop signal arrived; the loop acts on it between steps.

    A context manager: handlers are installed on entry and restored on exit. Signals may come twice
    (the launcher forwards what the scheduler already delivered to every rank).
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, object] = {}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True

    def __enter__(self) -> "StopRequest":
        """Install the handlers."""
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Restore the previous handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
