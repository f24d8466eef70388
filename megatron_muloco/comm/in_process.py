"""`run_in_turns`: K replicas as threads of one process, of which one runs at a time.

A replica runs until it needs data that another replica has not sent yet; then the next one runs::

    replica 0   H inner steps, send .                            receive, apply, ...
    replica 1                       H inner steps, send .
    replica 2                                            H inner steps, send, receive, apply, ...

Threads serve as coroutines here: a reduction waits in the middle of a call, twice if it has two
phases, and the code of a replica needs no change for it. Nothing runs concurrently, so the bits do
not depend on timing, and code that uses global state works as in a process of its own.

`InProcessGroup` replaces the process group between replicas. Whichever replica joins a collective
last carries it out for all of them, directly from buffer to buffer.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from megatron_muloco.errors import SyncError

__all__ = ["InProcessGroup", "run_in_turns"]

Result = TypeVar("Result")
Part = TypeVar("Part")


# ---- turns ---------------------------------------------------------------------------------------


class _Turns:
    """Lets one of K threads run at a time.

    Attributes:
        running: Replicas that have not ended, in ascending order.
        failure: The first exception of a replica.
    """

    def __init__(self, num_replicas: int) -> None:
        self.running = list(range(num_replicas))
        self.failure: BaseException | None = None
        self._gates = [threading.Semaphore(0) for _ in self.running]

    def begin(self) -> None:
        """Let replica 0 run."""
        self._gates[0].release()

    def take(self, replica: int) -> None:
        """Wait until it is the turn of ``replica``.

        Raises:
            SyncError: Another replica has failed.
        """
        self._gates[replica].acquire()
        if self.failure is not None:
            raise SyncError(f"replica {replica} was ended, because another replica has failed")

    def pass_on(self, replica: int) -> None:
        """Let the next replica run, and wait until it is the turn of ``replica`` again."""
        self._gates[self._after(replica)].release()
        self.take(replica)

    def end(self, replica: int) -> None:
        """Take ``replica``, whose turn it is, out of the turns for good."""
        following = self._after(replica)
        self.running.remove(replica)
        if self.running:
            self._gates[following].release()

    def fail(self, failure: BaseException) -> None:
        """End all replicas; only the first failure is kept."""
        if self.failure is None:
            self.failure = failure
            for gate in self._gates:
                gate.release()

    def _after(self, replica: int) -> int:
        later = [other for other in self.running if other > replica]
        return (later or self.running)[0]


def run_in_turns(num_replicas: int, body: Callable[["InProcessGroup"], Result]) -> list[Result]:
    """Return ``body(group)`` of every replica, in replica order.

    The calling thread only waits. What torch keeps by thread (gradient mode, function modes) has
    its defaults in ``body``; the random number generator is common to all replicas.

    Args:
        num_replicas: K.
        body: The program of one replica. It may wait for other replicas in the collectives of
            ``group`` and nowhere else: a lock of another replica would never be released.

    Raises:
        BaseException: The first exception of a replica; the others are then ended too.
    """
    turns, open_collectives = _Turns(num_replicas), dict[int, _Collective]()
    results: dict[int, Result] = {}

    def run(replica: int) -> None:
        try:
            turns.take(replica)
            group = InProcessGroup(replica, num_replicas, turns, open_collectives)
            results[replica] = body(group)
            turns.end(replica)
        # Any exception is raised again in the calling thread.
        except BaseException as error:  # noqa: BLE001
            turns.fail(error)

    # Daemons, so that an interrupt of the calling thread can end the process.
    threads = [
        threading.Thread(target=run, args=(replica,), name=f"replica {replica}", daemon=True)
        for replica in range(num_replicas)
    ]
    for thread in threads:
        thread.start()
    turns.begin()
    try:
        for thread in threads:
            thread.join()
    except BaseException as interrupt:
        turns.fail(interrupt)
        raise
    if turns.failure is not None:
        raise turns.failure
    return [results[replica] for replica in range(num_replicas)]


# ---- collectives ---------------------------------------------------------------------------------


@dataclass
class _Collective:
    """A collective that not all replicas have joined yet.

    Attributes:
        kind: Name of the collective.
        parts: Buffers or values of the replicas that have joined.
        is_done: Whether it was carried out.
    """

    kind: str
    parts: dict[int, Any] = field(default_factory=dict)
    is_done: bool = False


@dataclass(frozen=True)
class _Joined:
    """One replica's view of a collective; see `Pending`."""

    collective: _Collective
    index: int
    size: int
    turns: _Turns

    def wait(self) -> None:
        """Let other replicas run until all have joined.

        Raises:
            SyncError: A replica that has not joined has ended.
        """
        while not self.collective.is_done:
            missing = set(range(self.size)) - self.collective.parts.keys()
            if ended := sorted(missing.difference(self.turns.running)):
                raise SyncError(
                    f"replica {self.index} waits in {self.collective.kind} for replicas {ended}, "
                    "which have ended. All replicas must make the same collectives."
                )
            self.turns.pass_on(self.index)


class InProcessGroup:
    """One replica's place in the group of all replicas of this process; a `Wire`.

    Sums are made in replica order. So `AllReduce` over this group may round differently from a
    library's all-reduce of three or more replicas. The other reducers, which use the sum of no
    library, give the bits that they give over processes.

    Attributes:
        index: The replica.
        ranks: All replicas.

    Args:
        index: The replica.
        size: K.
        turns: The turns of the replicas.
        collectives: Collectives that not all replicas have joined, by number; the same dictionary
            for all replicas.
    """

    def __init__(
        self, index: int, size: int, turns: _Turns, collectives: dict[int, _Collective]
    ) -> None:
        self.index, self.ranks = index, list(range(size))
        self._turns, self._collectives = turns, collectives
        self._joined = 0

    def size(self) -> int:
        """Return K."""
        return len(self.ranks)

    def rank(self) -> int:
        """Return the replica."""
        return self.index

    def all_reduce(self, buffer: Tensor) -> _Joined:
        """See `Wire.all_reduce`."""

        def add(buffers: Sequence[Tensor]) -> None:
            total = buffers[0].clone()
            for other in buffers[1:]:
                total += other
            for each in buffers:
                each.copy_(total)

        return self._join("an all-reduce", buffer, add)

    def all_to_all(
        self,
        received: Tensor,
        sent: Tensor,
        *,
        receive_splits: Sequence[int],
        send_splits: Sequence[int],
    ) -> _Joined:
        """See `Wire.all_to_all`."""

        def deliver(parts: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> None:
            for receiver, (arriving, _) in enumerate(parts):
                for sender, (_, leaving) in enumerate(parts):
                    arriving[sender].copy_(leaving[receiver])

        part = (received.split(list(receive_splits)), sent.split(list(send_splits)))
        return self._join("an all-to-all", part, deliver)

    def all_gather(self, received: Tensor, own: Tensor) -> _Joined:
        """See `Wire.all_gather`."""

        def deliver(parts: Sequence[tuple[Tensor, Tensor]]) -> None:
            for into, _ in parts:
                for place, (_, each) in zip(into.chunk(len(parts)), parts, strict=True):
                    place.copy_(each)

        return self._join("an all-gather", (received, own.flatten()), deliver)

    def gather_objects(self, value: Result) -> list[Result]:
        """Return the ``value`` of every replica, in replica order; the objects are not copied."""
        gathered: list[Result] = []

        def deliver(parts: Sequence[tuple[list[Result], Result]]) -> None:
            for into, _ in parts:
                into.extend(each for _, each in parts)

        self._join("a gather of objects", (gathered, value), deliver).wait()
        return gathered

    def _join(self, kind: str, part: Part, carry_out: Callable[[Sequence[Part]], None]) -> _Joined:
        """Join the next collective; the last replica to join carries it out.

        Raises:
            SyncError: Another replica's next collective is of another kind.
        """
        number, self._joined = self._joined, self._joined + 1
        collective = self._collectives.setdefault(number, _Collective(kind))
        if collective.kind != kind:
            raise SyncError(
                f"replica {self.index} joins {kind} where replicas {sorted(collective.parts)} have "
                f"joined {collective.kind}. All replicas must make the same collectives."
            )
        collective.parts[self.index] = part
        if len(collective.parts) == self.size():
            # Now, not when each of them waits: a sender's buffers are its own again after its own
            # wait, and later receivers would read what it has written there since.
            carry_out([collective.parts[replica] for replica in self.ranks])
            collective.is_done = True
            del self._collectives[number]
        return _Joined(collective, self.index, self.size(), self._turns)
