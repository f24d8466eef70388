"""Measures what the links achieve: test transfers, read from the kernel's counters, and echoes.

TCP does not fill a link that delays or loses frames, so there the transfers are datagrams. Run as a
script, this file is one end of a transfer: ``probe.py ROLE PORT`` or ``probe.py ROLE PORT HOST``.
"""

import contextlib
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .commands import Link
    from .lab import Lab

__all__ = ["Achieved", "Echoes", "echoes", "off_by", "probe", "wrong_echoes"]

_PORT = 29400
_CHUNK = bytes(1 << 16)
_DATAGRAM = bytes(1472)  # a full frame of 1,514 bytes: headers of Ethernet, IP and UDP are 42
SETTLE_SECONDS, MEASURE_SECONDS = 2.0, 4.0  # chosen: slow start and a first loss are over by then
ALLOWED = 0.05  # of the nominal rate and of the nominal delay, either way
PINGS, _PING_SECONDS, _LAST_ECHO_SECONDS = 1000, 0.002, 1.0  # chosen: of 42 + 12 bytes; 0.2 Mbit/s
_ALLOWED_MS = 1.0  # chosen: of an echo, for two busy processes to wake up
_DEVIATIONS = 4.0  # chosen: a right link is refused once in 16,000 times


@dataclass(frozen=True, slots=True)
class Achieved:
    """Rate of one rank's link, in 10^6 bits of Ethernet frames a second.

    Attributes:
        rank: Rank at the end of the link.
        up: Rate sent by the rank.
        down: Rate received by the rank.
    """

    rank: int
    up: float
    down: float


@dataclass(frozen=True, slots=True)
class Echoes:
    """Small datagrams from every rank to the next one and back, links otherwise idle.

    Attributes:
        round_trip_ms: Rank -> median round trip.
        sent: Datagrams sent in all.
        lost: Datagrams that did not come back.
    """

    round_trip_ms: list[float]
    sent: int
    lost: int


def probe(lab: "Lab") -> list[Achieved]:
    """Load all links in both directions at once, each rank sending to the next, and measure."""
    from .counters import read_bytes

    roles = ("sink", "flood") if lab.link.is_impaired else ("receive", "send")
    with _pairs(lab, *roles) as (receivers, senders):
        _wait_for(senders)
        time.sleep(SETTLE_SECONDS)
        before = [(time.perf_counter(), *read_bytes(process.pid)) for process in receivers]
        time.sleep(MEASURE_SECONDS)
        after = [(time.perf_counter(), *read_bytes(process.pid)) for process in receivers]
    rates = []
    for rank, (first, last) in enumerate(zip(before, after, strict=True)):
        to_mbit = 8e-6 / (last[0] - first[0])
        rates.append(Achieved(rank, (last[1] - first[1]) * to_mbit, (last[2] - first[2]) * to_mbit))
    return rates


def echoes(lab: "Lab") -> Echoes:
    """Send datagrams from every rank to the next one at once, and wait for them to come back."""
    with _pairs(lab, "echo", "ping") as (_, senders):
        said = [process.communicate()[0].split() for process in senders]
    came_back = sum(int(count) for _, count in said)
    sent = PINGS * lab.ranks
    return Echoes([float(middle) for middle, _ in said], sent, sent - came_back)


@contextlib.contextmanager
def _pairs(
    lab: "Lab", receive: str, send: str
) -> "Iterator[tuple[list[subprocess.Popen[bytes]], list[subprocess.Popen[bytes]]]]":
    """Run one process of each role in every namespace; the second speaks to the next rank's."""
    from .commands import address

    with contextlib.ExitStack() as stack:

        def start(rank: int, *arguments: str) -> "subprocess.Popen[bytes]":
            script = [sys.executable, str(Path(__file__)), *arguments]
            process = subprocess.Popen(lab.inside(rank, script), stdout=subprocess.PIPE)
            stack.callback(_end, process)
            return process

        receivers = [start(rank, receive, str(_PORT)) for rank in range(lab.ranks)]
        _wait_for(receivers)
        next_ranks = [address((rank + 1) % lab.ranks) for rank in range(lab.ranks)]
        yield receivers, [start(r, send, str(_PORT), to) for r, to in enumerate(next_ranks)]


def off_by(achieved: list[Achieved], nominal: float, loss: float = 0.0) -> float:
    """Return the largest relative distance of a link from the nominal rate.

    What is lost between two links leaves the first one and does not enter the second.
    """
    ups = [link.up / nominal - 1 for link in achieved]
    downs = [link.down / (nominal * (1 - loss)) - 1 for link in achieved]
    return max(map(abs, ups + downs))


def wrong_echoes(found: Echoes, link: "Link") -> str:
    """Return what is not as asked for, or nothing.

    An echo takes twice the delay, and is lost where it, or what it answers, is.
    """
    nominal = 2 * link.delay_ms
    allowed = ALLOWED * nominal + _ALLOWED_MS
    worst = max(found.round_trip_ms, key=lambda ms: abs(ms - nominal))
    if abs(worst - nominal) > allowed:
        return f"an echo takes {worst:.2f} ms, not {nominal:g} ± {allowed:.2f}"
    share = 1 - (1 - link.loss) ** 2
    expected = found.sent * share
    allowed = _DEVIATIONS * sqrt(expected * (1 - share))
    if abs(found.lost - expected) > allowed:
        return f"{found.lost} of {found.sent} echoes were lost, not {expected:.0f} ± {allowed:.0f}"
    return ""


def _wait_for(processes: "list[subprocess.Popen[bytes]]") -> None:
    """Wait until each has said that it listens or sends."""
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _receive(port: int) -> None:
    with socket.create_server(("", port)) as server:
        print("listening", flush=True)
        connection, _ = server.accept()
        while connection.recv(1 << 18):
            pass


def _send(port: int, host: str) -> None:
    with socket.create_connection((host, port)) as connection:
        print("sending", flush=True)
        while True:
            connection.sendall(_CHUNK)


def _sink(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
        end.bind(("", port))
        print("listening", flush=True)
        while True:
            end.recv(1 << 16)


def _flood(port: int, host: str) -> None:
    """Send as fast as the shaper takes it: its queue counts against the socket's buffer."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
        end.connect((host, port))
        print("sending", flush=True)
        while True:
            end.send(_DATAGRAM)


def _echo(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
        end.bind(("", port))
        print("listening", flush=True)
        while True:
            end.sendto(*end.recvfrom(1 << 16))


def _ping(port: int, host: str) -> None:
    """Print the median of the round trips in ms (``nan`` without any) and how many came back."""
    stamp = struct.Struct("!d")
    trips: list[float] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
        end.connect((host, port))
        begin = time.monotonic()
        for number in range(PINGS):
            _collect(end, stamp, trips, until=begin + number * _PING_SECONDS)
            end.send(stamp.pack(time.monotonic()))
        last = time.monotonic() + _LAST_ECHO_SECONDS
        while len(trips) < PINGS and time.monotonic() < last:
            _collect(end, stamp, trips, until=time.monotonic() + _PING_SECONDS)
    print(median(trips) * 1e3 if trips else "nan", len(trips), flush=True)


def _collect(end: socket.socket, stamp: struct.Struct, trips: list[float], *, until: float) -> None:
    """Add the round trips of what comes back in time."""
    while (left := until - time.monotonic()) > 0:
        if select.select([end], [], [], left)[0]:
            trips.append(time.monotonic() - stamp.unpack(end.recv(64))[0])


_ROLES = {
    "receive": _receive,
    "send": _send,
    "sink": _sink,
    "flood": _flood,
    "echo": _echo,
    "ping": _ping,
}

if __name__ == "__main__":
    _ROLES[sys.argv[1]](int(sys.argv[2]), *sys.argv[3:])
