"""What the links really do: TCP transfers of our own, seen by the kernel's counters.

As a script it is one end of a transfer: ``probe.py receive PORT`` or ``probe.py send HOST PORT``.
"""

import contextlib
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .lab import Lab

__all__ = ["Achieved", "off_by", "probe"]

_PORT = 29400
_CHUNK = bytes(1 << 16)
SETTLE_SECONDS, MEASURE_SECONDS = 2.0, 4.0  # chosen: slow start and a first loss are over by then
ALLOWED = 0.05  # of the nominal rate, either way


@dataclass(frozen=True, slots=True)
class Achieved:
    """Rate of one rank's link, in 10^6 bits of Ethernet frames a second.

    Attributes:
        rank: Whose link.
        up: Sent by the rank.
        down: Received by it.
    """

    rank: int
    up: float
    down: float


def probe(lab: "Lab") -> list[Achieved]:
    """Load all links in both directions at once, each rank sending to the next, and measure."""
    from .commands import address
    from .counters import read_bytes

    def start(rank: int, *arguments: str) -> "subprocess.Popen[bytes]":
        script = [sys.executable, str(Path(__file__)), *arguments]
        return subprocess.Popen(lab.inside(rank, script), stdout=subprocess.PIPE)

    ranks = range(lab.ranks)
    with contextlib.ExitStack() as stack:
        receivers = [start(rank, "receive", str(_PORT)) for rank in ranks]
        for process in receivers:
            stack.callback(_end, process)
        _wait_for(receivers)
        senders = []
        for rank in ranks:
            target = address((rank + 1) % lab.ranks)
            senders.append(start(rank, "send", target, str(_PORT)))
            stack.callback(_end, senders[-1])
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


def off_by(achieved: list[Achieved], nominal: float) -> float:
    """Return the largest relative distance of a link from the nominal rate."""
    return max(abs(rate / nominal - 1) for link in achieved for rate in (link.up, link.down))


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


def _send(host: str, port: int) -> None:
    with socket.create_connection((host, port)) as connection:
        print("sending", flush=True)
        while True:
            connection.sendall(_CHUNK)


if __name__ == "__main__":
    if sys.argv[1] == "receive":
        _receive(int(sys.argv[2]))
    else:
        _send(sys.argv[2], int(sys.argv[3]))
