"""`Watch` finds the rank that does not arrive, names it, and ends the job within its time limit.

A collective that times out says neither what it was for nor who is missing, and over NCCL it ends
the process without a Python error. So each rank has one thread that posts a few hundred bytes to
the job's rendezvous store every beat: a count, what the training loop is in, and the number of
collectives that the rank has started in each of its groups. If its own training loop makes no
progress, the thread reads the posts of all ranks, twice::

    count stands still            the process is frozen or dead: its thread is, too
    fewer collectives in a group  the process lives, but has not arrived there
    no answer from the store      rank 0, which holds it, is frozen or dead

At 0.8 of the limit the thread writes this finding and its own stacks; at 0.95 it ends the process,
before the limit of torch. The first rank that ends for a fault writes it to the store. The others
read it with their next beat and end with the same exit code, so a launcher returns that code
whichever rank it looks at first.

The training loop only sets attributes (`enter`), which takes less than a microsecond.
"""

import json
import math
import os
import socket
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn, TypeVar

from megatron_muloco.errors import EXIT_LOST, SyncError

__all__ = ["Fault", "Post", "Watch", "missing_ranks"]

_PREFIX = "muloco-watch"
_SHOWN_AT, _ENDS_AT = 0.8, 0.95  # parts of the limit
_LONGEST_BEAT, _BEATS_PER_LIMIT = 5.0, 60.0  # seconds; posts in a limit
_BEATS_OF_A_LOOK = 3  # between two readings, in which a process that lives posts at least once
_ANSWER_SECONDS = 10.0  # longest wait for the store

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Post:
    """What one rank says about itself.

    Attributes:
        rank: Rank in the job.
        beat: Number of this post.
        doing: What the training loop is in.
        place: Host and process.
        started: Group -> number of collectives that the rank has started in it. A group is named by
            its axes and its first rank, which is the same name on all of its ranks.
    """

    rank: int
    beat: int
    doing: str
    place: str
    started: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Fault:
    """Why a job ends: what the first rank that failed has written.

    Attributes:
        rank: That rank.
        code: Exit code of all ranks.
        message: One or more lines.
    """

    rank: int
    code: int
    message: str


def missing_ranks(before: Mapping[int, Post], after: Mapping[int, Post], world: int) -> list[str]:
    """Return a line for each rank that others wait for; empty if nobody waits.

    Args:
        before: Rank -> its post.
        after: The same, some beats later.
        world: Number of ranks.
    """
    silent = [r for r in range(world) if r not in after or before.get(r) == after[r]]
    members: dict[str, dict[int, int]] = defaultdict(dict)
    for rank, post in after.items():
        for group, count in post.started.items():
            members[group][rank] = count
    lines = []
    for rank in range(world):
        behind = [g for g, counts in members.items() if counts.get(rank, 0) < max(counts.values())]
        behind = [group for group in behind if rank in members[group]]
        # A rank that is behind somewhere and waits elsewhere is not the cause.
        waits = any(
            rank in counts and min(counts.values()) < counts[rank] for counts in members.values()
        )
        if rank not in silent and (waits or not behind):
            continue
        where = "; ".join(f"{group.split('/')[0]} {sorted(members[group])}" for group in behind)
        groups = f", not arrived in {where}" if where else ""
        if rank not in after:
            lines.append(f"rank {rank}: has posted nothing yet; frozen, dead or not started")
        elif rank in silent:
            post = after[rank]
            lines.append(
                f"rank {rank} ({post.place}): silent, so frozen or dead; last in {post.doing}"
                f"{groups}"
            )
        else:
            post = after[rank]
            lines.append(f"rank {rank} ({post.place}): alive, in {post.doing}{groups}")
    return lines


class Watch:
    """The watch of one rank. Without `start` and `join` it does nothing.

    Args:
        orphaned: Whether the launcher of this process has ended.
        on_orphaned: Called once when it has.
        start_limit: Seconds within which `join` must be called after `start`.
    """

    def __init__(
        self,
        orphaned: Callable[[], bool] = lambda: False,
        on_orphaned: Callable[[], None] = lambda: None,
        *,
        start_limit: float = math.inf,
    ) -> None:
        self._start_limit = start_limit
        self._orphaned, self._on_orphaned = orphaned, on_orphaned
        self._store: Any = None
        self._rank, self._world = 0, 1
        self._limits = (0.0, 0.0)
        self._groups: dict[str, Any] = {}
        self._place = f"{socket.gethostname()}, process {os.getpid()}"
        self._doing, self._patient, self._entered = "start-up", True, 0
        self._beats = 0
        self._seen: object = None
        self._since = time.monotonic()
        self._finding: list[str] = []
        self._ending = False
        self._asking: threading.Thread | None = None
        self._lock = threading.Lock()  # held while the thread or `verdict` looks at the store
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    # ---- the training loop's side -----------------------------------------------------------

    def start(self) -> None:
        """Start the thread; before `join` it only looks whether the launcher lives."""
        self._thread.start()

    def join(self, store: Any, rank: int, world: int, *, limit: float, control: float) -> None:
        """Begin to post.

        Args:
            store: The job's rendezvous store.
            rank: This rank.
            world: Number of ranks.
            limit: Seconds without progress after which a job ends that waits for a rank.
            control: The same in start-up, saves and evaluations.
        """
        self._rank, self._world, self._limits = rank, world, (limit, control)
        # A clone has a connection of its own. With a shared one, a request of the training loop
        # that waits for an answer would hold up the posts.
        self._since = time.monotonic()
        self._store = store.clone() if hasattr(store, "clone") else store
        self._post_now()
        if world > 1 and not self._thread.is_alive():
            self.start()

    def follow(self, groups: Mapping[str, tuple[Sequence[int], Any]]) -> None:
        """Count collectives in these groups: axes -> its ranks and the process group."""
        self._groups = {f"{name}/{ranks[0]}": group for name, (ranks, group) in groups.items()}
        self._post_now()

    def enter(self, doing: str, *, patient: bool = False) -> None:
        """Note what the training loop does next.

        Args:
            doing: Part of a message, such as ``"inner step 7"``.
            patient: Whether ranks may wait there for file systems, so the longer limit holds.
        """
        self._doing, self._patient = doing, patient
        self._entered += 1

    def verdict(self, error: BaseException, code: int) -> int:
        """Return the exit code of the job after an error of this rank, and say who failed first.

        Args:
            error: What ended the training loop.
            code: Exit code of this rank if it is the first one that fails.
        """
        if self._store is None or self._world == 1:
            return code
        self._ending = True
        with self._lock:
            fault = self._fault()
            # Only errors of collectives may come from another rank.
            if fault is None and isinstance(error, RuntimeError | SyncError):
                lines = self._finding or self._look()
                if lines:
                    code = EXIT_LOST
                    self._say(self._report(lines))
            first = str(error).splitlines()
            text = f"{type(error).__name__}: {first[0] if first else ''}"
            fault = fault or self._claim(Fault(self._rank, code, text))
        if fault.rank != self._rank:
            self._say(f"rank {fault.rank} ended the job first: {fault.message}")
        else:
            self._let_others_read()
        return fault.code

    def close(self) -> None:
        """Stop the thread; after this nothing is posted."""
        self._closed.set()

    # ---- the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        orphaned = False
        while not self._closed.wait(self._beat_seconds()):
            if not orphaned and self._orphaned():
                orphaned = True
                self._on_orphaned()
            if self._store is None and self._idle() > self._start_limit:
                self._say(f"the job was not joined within {self._start_limit:.0f} s")
                self._say(_stacks())
                _end(EXIT_LOST)
            if self._store is not None and self._world > 1:
                with self._lock:
                    self._beat()

    def _beat(self) -> None:
        self._post()
        if (fault := self._fault()) is not None and fault.rank != self._rank:
            self._join_in(fault)
        progress = (self._entered, tuple(self._started().values()))
        if progress != self._seen:
            self._seen, self._since, self._finding = progress, time.monotonic(), []
            return
        limit = self._limit()
        if self._idle() >= _SHOWN_AT * limit and not self._finding:
            lines = self._look()
            if progress == (self._entered, tuple(self._started().values())) and lines:
                self._finding = lines
                self._say(self._report(lines))
                self._say(_stacks())
        if self._idle() >= _ENDS_AT * limit and self._finding:
            fault = self._claim(Fault(self._rank, EXIT_LOST, self._report(self._finding)))
            self._say(f"no progress for {self._idle():.0f} s; ended with exit code {fault.code}")
            self._let_others_read()
            _end(fault.code)

    def _join_in(self, fault: Fault) -> None:
        """End this rank with the code of the first one that failed, unless it ends by itself."""
        patience = time.monotonic() + 2 * self._beat_seconds()
        self._lock.release()  # `verdict` may want it
        while time.monotonic() < patience and not self._closed.wait(0.05):
            pass
        self._lock.acquire()
        if self._closed.is_set() or self._ending:
            return
        self._say(f"rank {fault.rank} ended the job first: {fault.message}")
        self._say(_stacks())
        _end(fault.code)

    def _look(self) -> list[str]:
        """Return the lines of `missing_ranks` for the whole job; takes some beats."""
        before = self._posts()
        for _ in range(_BEATS_OF_A_LOOK):
            time.sleep(self._beat_seconds())
            self._post()
        after = self._posts()
        if before is None or after is None:
            return ["rank 0: the job's rendezvous store, which it holds, does not answer; rank 0 "
                    "is frozen or dead, or its host cannot be reached"]  # fmt: skip
        return missing_ranks(before, after, self._world)

    def _report(self, lines: Sequence[str]) -> str:
        return (
            f"rank {self._rank} has waited {self._idle():.0f} s of at most {self._limit():.0f} s "
            f"in {self._doing} for:\n  " + "\n  ".join(lines)
        )

    # ---- the store --------------------------------------------------------------------------

    def _post_now(self) -> None:
        """Post before the next beat, which may be a second away: a rank may freeze until then."""
        if self._store is not None and self._world > 1:
            with self._lock:
                self._post()

    def _post(self) -> None:
        self._beats += 1
        post = Post(self._rank, self._beats, self._doing, self._place, self._started())
        text = json.dumps(asdict(post))
        self._ask(lambda: self._store.set(f"{_PREFIX}/{self._rank}", text))

    def _posts(self) -> dict[int, Post] | None:
        """Return the posts of all ranks that have posted; ``None`` without an answer."""

        def read() -> dict[int, Post]:
            keys = [f"{_PREFIX}/{rank}" for rank in range(self._world)]
            found = [key for key in keys if self._store.check([key])]
            return {(post := Post(**json.loads(self._store.get(key)))).rank: post for key in found}

        return self._ask(read)

    def _fault(self) -> Fault | None:
        def read() -> Fault | None:
            key = f"{_PREFIX}/fault"
            if not self._store.check([key]):
                return None
            return Fault(**json.loads(self._store.get(key)))

        return self._ask(read)

    def _claim(self, fault: Fault) -> Fault:
        """Return the fault of the job: this one, unless another rank has claimed one before."""
        text = json.dumps(asdict(fault))
        first = self._ask(lambda: self._store.compare_set(f"{_PREFIX}/fault", "", text))
        return fault if first is None else Fault(**json.loads(first))

    def _ask(self, request: Callable[[], Answer]) -> Answer | None:
        """Return the store's answer; ``None`` if there is none, which takes a limited time.

        A request to a frozen store blocks without end, also where torch has a limit for it: after
        that limit torch waits for the store to confirm that it gave up. So the request has a thread
        of its own, and there is no further one until it has come back.
        """
        if self._asking is not None and self._asking.is_alive():
            return None
        answers: list[Answer] = []

        def ask() -> None:
            with suppress(Exception):  # the store's process has died
                answers.append(request())

        self._asking = threading.Thread(target=ask, name="watch request", daemon=True)
        self._asking.start()
        self._asking.join(min(_ANSWER_SECONDS, max(0.1 * self._limits[0], 0.5)))
        return answers[0] if answers else None

    def _let_others_read(self) -> None:
        """Wait until the other ranks have read the fault: the store dies with rank 0."""
        if self._rank == 0:
            time.sleep(2 * self._beat_seconds())

    # ---- small parts ------------------------------------------------------------------------

    def _started(self) -> dict[str, int]:
        counts = {}
        for name, group in self._groups.items():
            with suppress(RuntimeError):  # a communicator that was never used, or was aborted
                counts[name] = int(group._get_sequence_number_for_group())
        return counts

    def _limit(self) -> float:
        return max(self._limits) if self._patient else self._limits[0]

    def _idle(self) -> float:
        return time.monotonic() - self._since

    def _beat_seconds(self) -> float:
        if self._store is None:
            return 1.0
        return min(_LONGEST_BEAT, self._limits[0] / _BEATS_PER_LIMIT)

    def _say(self, text: str) -> None:
        """Write lines to stderr, each with the rank, in one piece."""
        marked = "".join(f"[rank {self._rank}] {line}\n" for line in text.splitlines())
        with suppress(OSError):
            sys.stderr.write(marked)
            sys.stderr.flush()


def _stacks() -> str:
    """Return the stacks of all other threads of this process."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        if ident != threading.get_ident():
            parts.append(f"stack of thread {names.get(ident, ident)}, most recent call last:")
            parts.append("".join(traceback.format_stack(frame)).rstrip())
    return "\n".join(parts)


def _end(code: int) -> NoReturn:
    """End the process; threads in collectives cannot be ended otherwise."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
