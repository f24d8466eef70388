"""`StopRequest` receives stop signals; `StopAgreement` finds the step after which all stop.

`StopFile` is a request where signals do not reach, `Launchers` makes the end of a launcher one, and
`Terminal` gives Ctrl-C to a rank alone, because launchers would not survive it. No torch here: the
handlers are installed before anything heavy is imported.

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
import shlex
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Protocol

from megatron_muloco.errors import SyncError

__all__ = [
    "STOP_FILE",
    "Launchers",
    "StopAgreement",
    "StopFile",
    "StopRequest",
    "Store",
    "Terminal",
]

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
_OF_A_TERMINAL = (signal.SIGTSTP, signal.SIGCONT)  # Ctrl-Z, and `fg` or `bg`


class StopRequest:
    """Records that a stop signal arrived; the training loop acts on it between steps.

    A context manager that installs the signal handlers on entry and restores the previous ones on
    exit. A signal may arrive twice, because the launcher forwards signals that the scheduler has
    already sent to every rank. A second Ctrl-C ends the process at once, also while it waits in a
    collective: there Python runs no handlers, so a thread reads the numbers of the signals.

    Args:
        terminal: The terminal, which this process may take for itself; by default it does not.
    """

    def __init__(self, terminal: "Terminal | None" = None) -> None:
        self.requested = False
        self._terminal = terminal
        self._previous: dict[signal.Signals, object] = {}
        self._pipe: tuple[int, int] | None = None
        self._listener: threading.Thread | None = None

    def give_back_terminal(self) -> None:
        """Give the terminal back, if this process has it; call it before the process ends."""
        if self._terminal is not None:
            self._terminal.give_back()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGHUP:
            _leave_terminal()
        self.requested |= signum in _SIGNALS

    def _listen(self, pipe: int) -> None:
        """Act on the number of every signal, in a thread of its own."""
        interrupted = False
        while numbers := os.read(pipe, 1):
            number = numbers[0]
            self.requested |= number in _SIGNALS
            if number in (signal.SIGTSTP, signal.SIGCONT) and self._terminal is not None:
                self._terminal.pause_or_go_on(number)
            if number != signal.SIGINT:
                continue
            if self._terminal is not None:
                self._terminal.interrupted(again=interrupted)
            if interrupted:
                self.give_back_terminal()
                os._exit(_EXIT_INTERRUPTED)
            interrupted = True
        os.close(pipe)

    def __enter__(self) -> "StopRequest":
        """Install the handlers."""
        if self._pipe is None:
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._listener = threading.Thread(
                target=self._listen, args=(self._pipe[0],), name="signals", daemon=True
            )
            self._listener.start()
        has_terminal = self._terminal is not None and self._terminal.take()
        for number in _SIGNALS + (_OF_A_TERMINAL if has_terminal else ()):
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
        if self._pipe is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._pipe[1])  # which ends the thread, after what it has not read yet
            self._pipe = None
            if self._listener is not None:
                self._listener.join()
        self.give_back_terminal()


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

    @property
    def exist(self) -> bool:
        """Whether a launcher has started this process."""
        return bool(self._links)

    def siblings(self) -> Iterator[int]:
        """Yield the other processes that the launcher of this one has started."""
        own, parent = os.getpid(), os.getppid()
        for entry in self._proc.iterdir():
            process = int(entry.name) if entry.name.isdigit() else own
            if process != own and self._parent(process) == parent:
                yield process

    def command(self, arguments: Sequence[str]) -> str:
        """Return the command line that started the job, as a person would write it.

        Args:
            arguments: The words of this process's own command line, the script first.
        """
        words = self._words(self._links[-1][1]) if self._links else []
        at = next((i for i, word in enumerate(words) if Path(word).name in _LAUNCHERS), None)
        # Without a command above it, the launcher of a machine was started by this program.
        if at is None or words[at] == "deepspeed.launcher.launch":
            return shlex.join(["python", *arguments])
        by_module = words[at - 1] == "-m"
        return shlex.join(
            [*(["python", "-m"] if by_module else []), Path(words[at]).name, *words[at + 1 :]]
        )

    def _parent(self, process: int) -> int:
        """Return the parent of a process, 0 if there is no such process."""
        try:
            text = (self._proc / str(process) / "stat").read_text(errors="replace")
        except OSError:
            return 0
        # The second field is the command in brackets and may contain spaces.
        return int(text.rpartition(")")[2].split()[1])

    def _is_launcher(self, process: int) -> bool:
        # The interpreter, its options and the script or module; not the arguments of the script.
        return any(Path(word).name in _LAUNCHERS for word in self._words(process)[:6])

    def _words(self, process: int) -> list[str]:
        """Return the command line of a process; empty if there is no such process."""
        try:
            text = (self._proc / str(process) / "cmdline").read_text(errors="replace")
        except OSError:
            return []
        return text.removesuffix("\0").split("\0")


# ---- the terminal ------------------------------------------------------------------------


class Terminal:
    """The terminal of a job that was started by hand, which one rank takes for itself.

    A terminal sends Ctrl-C to all processes of its foreground group. DeepSpeed's launchers end by
    it: the command returns at once with a stack trace, while ranks still save. So the first rank of
    the machine makes a group of its own and puts it into the foreground::

        foreground     deepspeed, launcher, rank 1, ...        before
                       rank 0                                  while it runs: Ctrl-C is its alone
                       deepspeed, launcher, rank 1, ...        from its last line on

    The launchers then see ranks that end with 85, and return that. On Ctrl-Z the rank goes back to
    the group and stops all of it, as without this class.

    Args:
        launchers: The launchers above this process.
        path: The terminal of the session.
    """

    def __init__(self, launchers: Launchers, path: str = "/dev/tty") -> None:
        self._launchers, self._path = launchers, path
        self._before = os.getpgrp()
        self._descriptor = -1

    def take(self) -> bool:
        """Take the terminal; return whether this process has it.

        It does not if it has no launcher, is not the first rank of its machine, is not in the
        foreground, has neither input nor output there, or ignores Ctrl-C.
        """
        if self._descriptor >= 0:
            return True
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        if not first or ignored or not self._launchers.exist or not any(map(_is_tty, range(3))):
            return False
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:
            return False  # no terminal
        try:
            if _is_alive(os.tcgetpgrp(descriptor), other_than=self._before):
                os.close(descriptor)  # this job is in the background
                return False
            os.setpgid(0, 0)
            _put_in_front(descriptor, os.getpgrp())
        except OSError:  # a session leader keeps its group
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        return True

    def give_back(self) -> None:
        """Put the launchers into the foreground again, if this process is there."""
        if self._descriptor < 0:
            return
        descriptor, self._descriptor = self._descriptor, -1
        with suppress(OSError):
            if os.tcgetpgrp(descriptor) == os.getpgrp():
                _put_in_front(descriptor, self._before)
        with suppress(OSError):
            os.setpgid(0, self._before)
        os.close(descriptor)

    def interrupted(self, *, again: bool) -> None:
        """Pass a Ctrl-C on to the other ranks, if it was for this one alone."""
        if self._descriptor < 0:
            return
        for process in self._launchers.siblings():
            with suppress(OSError):
                os.kill(process, signal.SIGINT)
        if not again:
            text = "\nStopping after the next steps. Ctrl-C again ends at once, without a save.\n"
            with suppress(OSError):
                os.write(self._descriptor, text.encode())

    def pause_or_go_on(self, number: int) -> None:
        """Stop the whole job on SIGTSTP; take the terminal again on SIGCONT."""
        if number == signal.SIGTSTP and self._descriptor >= 0:
            self.give_back()
            os.killpg(self._before, signal.SIGSTOP)  # this process is in the group again
        elif number == signal.SIGCONT:
            self.take()


def _is_tty(descriptor: int) -> bool:
    try:
        return os.isatty(descriptor)
    except OSError:
        return False


def _is_alive(group: int, *, other_than: int) -> bool:
    """Whether ``group`` is another group than the given one and has processes."""
    if group == other_than:
        return False
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _put_in_front(descriptor: int, group: int) -> None:
    """Make a group the foreground group; the caller may be in the background."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTOU])
    try:
        os.tcsetpgrp(descriptor, group)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---- a stop file -------------------------------------------------------------------------

STOP_FILE = "STOP"  # in checkpoint.dir
_LOOK_SECONDS = 1.0  # between two looks: on network file systems a look may take milliseconds


class StopFile:
    """A file that asks a run to stop when somebody makes it, where signals do not reach.

    One rank looks. The request is agreed on like a signal. The run removes the file when it has
    stopped, so that the next start goes on; after a fault it stays.

    Args:
        path: The file; ``None`` for a rank that does not look, or a run that saves nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._found = False
        self._looked = -math.inf

    def found(self) -> bool:
        """Whether the file was there, at most once a second."""
        now = time.monotonic()
        if self._path is not None and not self._found and now - self._looked >= _LOOK_SECONDS:
            self._looked = now
            self._found = self._path.exists()
        return self._found

    def remove(self) -> None:
        """Remove the file, if there is one."""
        if self._path is not None:
            with suppress(OSError):
                self._path.unlink()
