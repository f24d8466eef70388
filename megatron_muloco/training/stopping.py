"""`StopRequest` receives stop signals; `StopAgreement` finds the step after which all stop.

`Launchers` makes the end of a launcher a stop request. No torch here: the handlers are installed
before anything heavy is imported.

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

import ctypes
import math
import os
import signal
import stat
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Protocol

from megatron_muloco.errors import SyncError

__all__ = ["Launchers", "StopAgreement", "StopRequest", "Store"]

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
        limit: Seconds that `decide` waits for the other replicas.
    """

    def __init__(
        self, store: Store, *, replica: int, num_replicas: int, limit: float = math.inf
    ) -> None:
        self._store, self._limit = store, limit
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

        Raises:
            SyncError: Some have not posted within the limit. The message names them.
        """
        if not self._store.check([f"{_PREFIX}/requested"]):
            return None
        self._store.set(f"{_PREFIX}/reached/{self._replica}", str(step))
        began = time.monotonic()
        while True:
            # Announcements must be read before posts. In the other order, with A and B at step 7:
            # A reads the posts and misses B's; B posts 7, decides on 8 and announces an outer step
            # at 8; A reads that announcement and trains on, posts 8 and decides on 9, while B stops
            # after 8. In this order, an announcement by a replica that has decided is always
            # followed by a read that finds all posts.
            awaited = any((ahead or 0) > step for ahead in self._numbers("meeting"))
            posts = self._numbers("reached")
            reached = [post for post in posts if post is not None]
            if len(reached) == len(self._replicas):
                return max(reached) + 1
            if awaited:
                # Another replica waits in an outer step. It can post only after this one joins it.
                return None
            if time.monotonic() - began > self._limit:
                late = [replica for replica, post in enumerate(posts) if post is None]
                raise SyncError(
                    f"a stop was requested, and replica {self._replica} has finished step {step}, "
                    f"but replicas {late} have not said within {self._limit:.0f} s which step they "
                    "have finished. Their first ranks are frozen or dead, or a step takes longer "
                    "than training.distributed_timeout_minutes. Start the same command again: it "
                    "goes on from the last checkpoint."
                )
            time.sleep(_POLL_SECONDS)

    def _numbers(self, kind: str) -> list[int | None]:
        """Return the number of each replica under ``kind``; ``None`` where there is none."""
        return [self._number(f"{_PREFIX}/{kind}/{replica}") for replica in self._replicas]

    def _number(self, key: str) -> int | None:
        return int(self._store.get(key)) if self._store.check([key]) else None


# ---- stop signals ------------------------------------------------------------------------

# SIGUSR1 comes from SLURM before the time limit, SIGTERM from an operator or a launcher, SIGINT
# from Ctrl-C and SIGHUP from a terminal that closes.
_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Ignored on purpose: `nohup` ignores SIGHUP, a shell ignores SIGINT for commands with `&`. The
# others are ignored to shield launchers, and ranks must hear them.
_LEFT_IGNORED = (signal.SIGINT, signal.SIGHUP)
_EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class StopRequest:
    """Records that a stop signal arrived; the training loop acts on it between steps.

    A context manager that installs the signal handlers on entry and restores the previous ones on
    exit. A signal may arrive twice, because the launcher forwards signals that the scheduler has
    already sent to every rank. A second Ctrl-C ends the process at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self._interrupted = False
        self._previous: dict[signal.Signals, object] = {}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self._interrupted:
            os._exit(_EXIT_INTERRUPTED)
        self._interrupted |= signum == signal.SIGINT
        if signum == signal.SIGHUP:
            _leave_terminal()
        self.requested = True

    def __enter__(self) -> "StopRequest":
        """Install the handlers."""
        for number in _SIGNALS:
            if number in _LEFT_IGNORED and signal.getsignal(number) is signal.SIG_IGN:
                continue
            # A second entry finds its own handlers and keeps what was there before the first.
            self._previous.setdefault(number, signal.signal(number, self._note))
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


def _leave_terminal() -> None:
    """Send output that went to a terminal nowhere: writing to one that has closed is an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.dup2(nowhere, descriptor)
    os.close(nowhere)


# ---- the launcher's end ------------------------------------------------------------------

_LAUNCHERS = (
    "deepspeed",
    "deepspeed.launcher.runner",
    "deepspeed.launcher.launch",
    "torchrun",
    "torch.distributed.run",
)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Launchers:
    """The launchers above this process: its parent, and that one's parent while it is one, too.

    The command ``deepspeed`` starts a launcher for the machine, which starts the ranks. Neither
    tells its children when it is killed, and they would train on as orphans. `attend` makes the end
    of any of them a stop request of this process.

    Args:
        proc: Where Linux lists processes.
    """

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._links: list[tuple[int, int]] = []
        child, parent = os.getpid(), os.getppid()
        while parent > 1 and self._is_launcher(parent):
            self._links.append((child, parent))
            child, parent = parent, self._parent(parent)

    def attend(self) -> None:
        """Ask the kernel for SIGTERM when the parent ends, if that is a launcher.

        This also holds for a program that replaces this process.
        """
        if not self._links or not sys.platform.startswith("linux"):
            return
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if self.ended():  # before the call
            self.request_stop()

    def ended(self) -> bool:
        """Whether one of them has ended: the kernel then gives its child another parent."""
        return any(self._parent(child) != parent for child, parent in self._links)

    @staticmethod
    def request_stop() -> None:
        """Make it a stop request of this process."""
        os.kill(os.getpid(), signal.SIGTERM)

    def _parent(self, process: int) -> int:
        """Return the parent of a process, 0 if there is no such process."""
        try:
            text = (self._proc / str(process) / "stat").read_text(errors="replace")
        except OSError:
            return 0
        # The second field is the command in brackets and may contain spaces.
        return int(text.rpartition(")")[2].split()[1])

    def _is_launcher(self, process: int) -> bool:
        try:
            words = (self._proc / str(process) / "cmdline").read_text(errors="replace").split("\0")
        except OSError:
            return False
        # The interpreter, its options and the script or module; not the arguments of the script.
        return any(Path(word).name in _LAUNCHERS for word in words[:6])
