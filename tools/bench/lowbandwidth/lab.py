"""`Lab`: network namespaces joined by shaped links, removed again whatever happens."""

import atexit
import ctypes
import os
import shutil
import signal
import subprocess
from pathlib import Path
from types import TracebackType

from .commands import (
    Link,
    Names,
    congestion_command,
    create_commands,
    owner_of,
    relay_command,
    shape_commands,
)

__all__ = ["Lab", "LabError", "die_with_parent", "started", "sweep", "why_not_here"]

# Chosen: most machines run cubic; bbr models the bottleneck, and a token bucket misleads it. A
# kernel may refuse cubic to namespaces (tcp_allowed_congestion_control), but never reno.
_CONGESTION_CONTROL = ("cubic", "reno")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class LabError(Exception):
    """The laboratory could not do what was asked; the text says why and what to do."""


def why_not_here() -> str:
    """Return why no laboratory can be built on this machine by this user, or nothing."""
    if os.geteuid() != 0:
        return "network namespaces and traffic shaping need root"
    missing = [tool for tool in ("ip", "tc", "sysctl") if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not found; install iproute2 (and procps)"
    return _try(["tbf", "rate", "1mbit", "burst", "16kb", "limit", "64kb"])


def _impairer(link: Link) -> str:
    """Return what delays frames here and drops some; nothing where none is."""
    if not link.is_impaired:
        return ""
    return "relay" if _try(["netem", "delay", "1ms"]) else "netem"


def die_with_parent() -> None:
    """Let the kernel kill this process when the laboratory dies, even by SIGKILL."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _try(qdisc: list[str]) -> str:
    """Return why a link in a namespace cannot have a queueing discipline, or nothing."""
    name = Names(os.getpid(), started(os.getpid())).rank(0) + "-trial"
    made = _run(["ip", "netns", "add", name])
    if made.returncode == 0:
        veth = ["type", "veth", "peer", "name", "b"]
        made = _run(["ip", "-n", name, "link", "add", "name", "a", *veth])
        if made.returncode == 0:
            made = _run(["tc", "-n", name, "qdisc", "add", "dev", "a", "root", *qdisc])
        _run(["ip", "netns", "del", name])
    return f"the kernel refuses: {made.stderr.strip()}" if made.returncode else ""


class Lab:
    """Namespaces joined by links; a context manager.

    Args:
        ranks: Namespaces beside the hub.
        link: How each link is shaped.

    Attributes:
        impaired_by: Program that delays and drops frames: ``netem``, else ``relay``, our own
            switch in user space; nothing where the link has neither delay nor loss.

    Raises:
        LabError: On entering, where a command fails; nothing is left behind.
    """

    def __init__(self, ranks: int, link: Link) -> None:
        self.ranks, self.link = ranks, link
        self.congestion_control = self.impaired_by = ""
        self._relay: subprocess.Popen[str] | None = None
        self.names = Names(os.getpid(), started(os.getpid()))

    def __enter__(self) -> "Lab":
        sweep()
        atexit.register(self.close)
        try:
            self.impaired_by = _impairer(self.link)
            relayed = self.impaired_by == "relay"
            for command in create_commands(self.names, self.ranks, bridge=not relayed):
                _checked(command)
            self.congestion_control = self._choose_congestion_control()
            for command in shape_commands(self.names, self.ranks, self.link, netem=not relayed):
                _checked(command)
            if relayed:
                self._start_relay()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove everything, with the processes that still run inside; a second call is fine."""
        atexit.unregister(self.close)
        for name in _namespaces():
            if owner_of(name) == (self.names.pid, self.names.started):
                _remove(name)
        if self._relay is not None:
            self._relay.kill()
            self._relay.communicate()
            self._relay = None

    def check(self) -> None:
        """Raise `LabError` where the relay has ended, without which no frame arrives."""
        if self._relay is not None and self._relay.poll() is not None:
            said = self._relay.communicate()[1].strip()
            raise LabError(f"the relay ended with {self._relay.returncode}: {said}")

    def _start_relay(self) -> None:
        self._relay = subprocess.Popen(
            relay_command(self.names, self.ranks, self.link),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=die_with_parent,
        )
        assert self._relay.stdout is not None
        if not self._relay.stdout.readline():  # it switches once it has said so
            self._relay.wait()
            self.check()

    def _choose_congestion_control(self) -> str:
        for algorithm in _CONGESTION_CONTROL:
            commands = [congestion_command(self.names, r, algorithm) for r in range(self.ranks)]
            if all(_run(command).returncode == 0 for command in commands):
                return algorithm
        raise LabError(f"the kernel lets namespaces have none of {_CONGESTION_CONTROL}")

    def inside(self, rank: int, command: list[str]) -> list[str]:
        """Return ``command`` as it is run in a rank's namespace; the pid stays the same."""
        return ["ip", "netns", "exec", self.names.rank(rank), *command]


def sweep() -> list[str]:
    """Remove what killed laboratories have left; return the names of their namespaces."""
    left = []
    for name in _namespaces():
        owner = owner_of(name)
        if owner is not None and started(owner[0]) != owner[1]:
            _remove(name)
            left.append(name)
    return left


def started(pid: int) -> int:
    """Return the start time of a process in clock ticks since boot; 0 where there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    # The name, in parentheses, may hold anything; starttime is field 22, the 20th after it.
    return int(stat.rpartition(")")[2].split()[19])


def _namespaces() -> list[str]:
    listed = _run(["ip", "netns", "list"]).stdout.splitlines()
    return [line.split()[0] for line in listed if line.strip()]


def _remove(namespace: str) -> None:
    """Kill what runs in a namespace and delete it, and with it its ends of links."""
    for pid in _run(["ip", "netns", "pids", namespace]).stdout.split():
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            continue
    _run(["ip", "netns", "del", namespace])


def _checked(command: list[str]) -> None:
    done = _run(command)
    if done.returncode == 0:
        return
    raise LabError(f"{' '.join(command)}\n  {done.stderr.strip()}")


def _run(command: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True, check=False)
