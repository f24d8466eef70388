"""`Lease`: the right of one run to write to a checkpoint directory.

::

    DIR/run.lock      {"token": ..., "host": ..., "pid": ..., "started": ..., "beat": 17}

Rank 0 of a run makes the file before it looks for checkpoints, rewrites it every few seconds, and
deletes it at the end. A run that finds the file of another one decides whether that one is alive:

- on the same machine by the process: a killed run never blocks its restart;
- otherwise by the file: a run that does not rewrite it for `_SILENT_SECONDS` is taken for dead. The
  newcomer watches its content and compares no clocks.

fcntl and flock locks are not used: network file systems forget them, ignore them or need a daemon
for them. What is used, creating a file exclusively and renaming it, is atomic on NFS too, and a
file that is opened again is read anew there. A run that was suspended for longer than the limit may
lose its lease. It learns so before it publishes (`check`), and publishes nothing more.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from typing_extensions import override

from megatron_muloco.errors import CheckpointError

__all__ = ["LOCK_FILE", "Holder", "Lease"]

LOCK_FILE = "run.lock"
_BEAT_SECONDS = 10.0
# Chosen: nine missed beats, and longer than an NFS client caches attributes (60 s by default).
_SILENT_SECONDS = 90.0
_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Holder:
    """Content of a lock file.

    Attributes:
        token: Random name of the lease.
        host: Host name of rank 0.
        machine: Boot and process namespace in which ``pid`` has a meaning; empty where unknown.
        pid: Process of rank 0.
        born: Start time of the process in clock ticks after boot; 0 where unknown.
        started: When the run took the lease, in UTC.
        beat: Grows while the run is alive.
    """

    token: str
    host: str
    machine: str
    pid: int
    born: int
    started: str
    beat: int = 0

    @override
    def __str__(self) -> str:
        """Return who it is, in words."""
        return f"process {self.pid} on {self.host}, which started at {self.started}"


class Lease:
    """One run's lease on a directory; rank 0 alone has one.

    Args:
        directory: The checkpoint directory; created if it is not there.
        say: Function that shows a line to the user while `acquire` waits.
        silent_seconds: Time without a beat after which a run elsewhere is taken for dead.
        beat_seconds: Time between two beats.
    """

    def __init__(
        self,
        directory: Path,
        say: Callable[[str], object],
        *,
        silent_seconds: float = _SILENT_SECONDS,
        beat_seconds: float = _BEAT_SECONDS,
    ) -> None:
        self._path = directory / LOCK_FILE
        self._say, self._silent, self._beat = say, silent_seconds, beat_seconds
        self._own = Holder(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            born=_born(os.getpid()) or 0,
            started=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        )
        self._ended = threading.Event()
        self._beating: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lease.

        Raises:
            CheckpointError: Another run holds it.
            OSError: The directory cannot be created or written.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while not self._create():
            holder = self._read()
            if holder is not None and _alive(holder):
                raise CheckpointError(self._refusal(holder))
            if holder is None or _alive(holder) is None:
                self._watch(holder)
            self._clear(holder)
        self._beating = threading.Thread(target=self._keep_alive, name="lease", daemon=True)
        self._beating.start()

    def check(self) -> None:
        """Raise CheckpointError if another run has taken the lease.

        A file that somebody has deleted is made again: whoever makes it first has the lease.
        """
        holder = self._read()
        if holder is None and self._create():
            return
        if holder is None or holder.token != self._own.token:
            by = "cannot be read" if holder is None else f"now belongs to {holder}"
            raise CheckpointError(
                f"{self._path} {by}, so this run must not write there any more. It was suspended, "
                "or could not reach the disk, for too long. Stop one of the runs, or give one of "
                "them another checkpoint.dir."
            )

    def release(self) -> None:
        """Give the lease back, if it is still this run's. Never raises."""
        self._ended.set()
        if self._beating is not None:
            self._beating.join()  # a beat that comes later would make the file again
        try:
            self.check()
            self._path.unlink()
        except (OSError, CheckpointError):
            pass  # another run has it, or the disk is gone

    # ---- taking it --------------------------------------------------------------------------

    def _create(self) -> bool:
        """Make the file; return False if there is one."""
        try:
            descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(self._own)))
            stream.flush()
            os.fsync(stream.fileno())
        return True

    def _read(self) -> Holder | None:
        """Return the content; ``None`` if there is no file, or none that a run has completed."""
        try:
            return Holder(**json.loads(self._path.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def _watch(self, holder: Holder | None) -> None:
        """Return when the file has not changed for long enough.

        Raises:
            CheckpointError: It changed: its run is alive.
        """
        who = f"belongs to {holder}" if holder is not None else "cannot be read"
        self._say(
            f"{self._path} {who}; waiting {self._silent:.0f} s to see whether its run is alive"
        )
        deadline = time.monotonic() + self._silent
        while time.monotonic() < deadline and self._path.exists():
            time.sleep(min(_POLL_SECONDS, self._silent))
            now = self._read()
            if now is not None and now != holder:
                raise CheckpointError(self._refusal(now))

    def _clear(self, holder: Holder | None) -> None:
        """Remove the file of a run that is dead; of several newcomers one does so."""
        aside = self._path.with_name(f".tmp-{LOCK_FILE}-{self._own.token}")
        try:
            self._path.rename(aside)
        except FileNotFoundError:
            return
        try:
            taken = Holder(**json.loads(aside.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            taken = None
        if taken is not None and (holder is None or taken.token != holder.token):
            # Between the decision and the rename another newcomer has made its own.
            aside.rename(self._path)
            raise CheckpointError(self._refusal(taken))
        aside.unlink()

    def _refusal(self, holder: Holder) -> str:
        return (
            f"{self._path.parent} is in use by another run: {holder}. Two runs in one directory "
            "would resume from and delete each other's checkpoints. Wait for that run, stop it, or "
            f"give this one another checkpoint.dir. If you are sure that it has ended, delete "
            f"{self._path}."
        )

    # ---- keeping it -------------------------------------------------------------------------

    def _keep_alive(self) -> None:
        """Rewrite the file with a larger beat until the end, or until another run has it."""
        beat = 0
        temporary = self._path.with_name(f".tmp-{LOCK_FILE}")
        while not self._ended.wait(self._beat):
            beat += 1
            try:
                self.check()
                text = json.dumps(asdict(self._own) | {"beat": beat})
                temporary.write_text(text, encoding="utf-8")
                temporary.replace(self._path)
            except CheckpointError:
                return
            except OSError:
                continue  # a disk that is full or away for a moment; `check` decides before a save


def _alive(holder: Holder) -> bool | None:
    """Return whether the process of a holder lives; ``None`` where this machine cannot know."""
    if not holder.machine or holder.machine != _machine():
        return None
    born = _born(holder.pid)
    # An older lease of this very process: a run that has ended in it.
    return born is not None and born == holder.born and holder.pid != os.getpid()


def _machine() -> str:
    """Return what process numbers depend on: the boot and the process namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _born(pid: int) -> int | None:
    """Return the start time of a process in clock ticks after boot; ``None`` if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name of the program, in parentheses, may hold spaces; a zombie has ended.
    state, *rest = text.rpartition(")")[2].split()
    return None if state in "ZX" else int(rest[18])
