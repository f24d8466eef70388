"""A laboratory: built, shaped, and taken down again whatever happens."""

import atexit
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
    shape_commands,
)

__all__ = ["Lab", "LabError", "no_netem", "started", "sweep", "why_not_here"]

# Chosen: cubic is what most machines run; bbr models the bottleneck, and a token bucket misleads
# it. A kernel may keep cubic from namespaces (tcp_allowed_congestion_control), but never reno.
_CONGESTION_CONTROL = ("cubic", "reno")


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


def no_netem() -> str:
    """Return why links cannot be delayed here or lose packets, or nothing."""
    return why_not_here() or (_try(["netem", "delay", "1ms"]) and "this kernel has no netem")


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

    Raises:
        LabError: On entering, where a command fails; nothing is left behind.
    """

    def __init__(self, ranks: int, link: Link) -> None:
        self.ranks, self.link = ranks, link
        self.congestion_control = ""
        self.names = Names(os.getpid(), started(os.getpid()))

    def __enter__(self) -> "Lab":
        sweep()
        atexit.register(self.close)
        try:
            for command in create_commands(self.names, self.ranks):
                _checked(command)
            self.congestion_control = self._choose_congestion_control()
            for command in shape_commands(self.names, self.ranks, self.link):
                _checked(command)
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
    reason = f"{' '.join(command)}\n  {done.stderr.strip()}"
    if "netem" in command:
        reason += (
            "\nThis kernel has no netem, so delay and loss are n/a here. Leave --delay-ms and "
            "--loss out, or use a kernel with CONFIG_NET_SCH_NETEM."
        )
    raise LabError(reason)


def _run(command: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True, check=False)
