"""`StopRequest` receives stop signals; `StopAgreement` finds the step after which all stop.

Signals reach ranks at different moments, and between two outer steps replicas are at different
inner steps. A collective over replicas would hang there, so their leaders agree through the job's
rendezvous store:

1. The leader of a replica that was asked to stop sets ``requested``. All leaders read it once per
   inner step.
2. Each leader then posts the last step that its replica has finished, and waits for all posts.
3. All replicas stop after the largest posted step + 1. In the extra step the leader's decision
   reaches the other ranks of its replica, with the all-reduce of the loss.

Deadlock to avoid: replica A waits for the post of B, while B waits for A in an outer step. So a
leader announces an outer step before its replica enters it. A waiting leader that sees an
announcement ahead of its own step trains on, and posts again after the next step. No replica can
pass an outer step that another has not reached, so all leaders see the same largest post::

    A    step 5, post 5; B announced 8: train on   6   7   8 == outer step == post 8, stop after 9
    B    step 8, announce 8, wait for A ................. 8 == outer step == post 8, stop after 9
"""

import signal
import time
from types import FrameType, TracebackType
from typing import Protocol

__all__ = ["StopAgreement", "StopRequest", "Store"]

_POLL_SECONDS = 0.02
_PREFIX = "muloco-stop"  # keys are never deleted; every start of a job has a new store


class Store(Protocol):
    """The methods of a torch rendezvous store that `StopAgreement` uses."""

    def set(self, key: str, value: str) -> object:
        """Write ``value``."""

    def get(self, key: str) -> bytes:
        """Return the value of an existing key."""

    def check(self, keys: list[str]) -> bool:
        """Return whether all ``keys`` exist, without waiting for them."""


class StopAgreement:
    """The agreement on a stop step, as seen by the leader of one replica.

    Args:
        store: Rendezvous store that the leaders of all replicas share.
        replica: Index of this replica.
        num_replicas: K, the number of replicas.
    """

    def __init__(self, store: Store, *, replica: int, num_replicas: int) -> None:
        self._store = store
        self._replica = replica
        self._replicas = range(num_replicas)

    def request(self) -> None:
        """Ask all replicas to stop."""
        self._store.set(f"{_PREFIX}/requested", "1")

    def announce(self, step: int) -> None:
        """Announce that this replica is about to wait for all others, after inner step ``step``."""
        self._store.set(f"{_PREFIX}/meeting/{self._replica}", str(step))

    def decide(self, step: int) -> int | None:
        """Return the step after which to stop, or ``None`` to train on.

        Called between steps, after inner step ``step`` and its outer steps. After a request it
        waits until all replicas have posted, unless another replica waits for this one.
        """
        if not self._store.check([f"{_PREFIX}/requested"]):
            return None
        self._store.set(f"{_PREFIX}/reached/{self._replica}", str(step))
        while True:
            # Announcements must be read before posts. In the other order, with A and B at step 7:
            # A reads the posts and misses B's; B posts 7, decides on 8 and announces an outer step
            # at 8; A reads that announcement and trains on, posts 8 and decides on 9, while B stops
            # after 8. In this order, an announcement by a replica that has decided is always
            # followed by a read that finds all posts.
            awaited = any((ahead or 0) > step for ahead in self._numbers("meeting"))
            reached = [post for post in self._numbers("reached") if post is not None]
            if len(reached) == len(self._replicas):
                return max(reached) + 1
            if awaited:
                # Another replica waits in an outer step. It can post only after this one joins it.
                return None
            time.sleep(_POLL_SECONDS)

    def _numbers(self, kind: str) -> list[int | None]:
        """Return the number of each replica under ``kind``; ``None`` where there is none."""
        return [self._number(f"{_PREFIX}/{kind}/{replica}") for replica in self._replicas]

    def _number(self, key: str) -> int | None:
        return int(self._store.get(key)) if self._store.check([key]) else None


# ---- stop signals: SIGUSR1 from SLURM before the time limit, SIGTERM from an operator ----

_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class StopRequest:
    """Records that a stop signal arrived; the training loop acts on it between steps.

    A context manager that installs the signal handlers on entry and restores the previous ones on
    exit. A signal may arrive twice, because the launcher forwards signals that the scheduler has
    already sent to every rank.
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
