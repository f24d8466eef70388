"""Bytes on the ranks' links over time, as the kernel counts them."""

import threading
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path

from .commands import DEVICE

__all__ = ["Sampler", "bytes_at", "interface_bytes", "read_bytes"]

_PERIOD_SECONDS = 0.05  # chosen: between two samples a line of 100 Mbit/s sends 0.6 MB

Samples = Sequence[tuple[float, int, int]]
"""(seconds since the epoch, bytes sent, bytes received), in order."""


def interface_bytes(table: str, device: str = DEVICE) -> tuple[int, int]:
    """Return bytes sent and received by a device, from the text of a ``net/dev`` file.

    Raises:
        ValueError: The device is not in it.
    """
    for line in table.splitlines():
        name, colon, numbers = line.partition(":")
        if colon and name.strip() == device:
            fields = numbers.split()
            return int(fields[8]), int(fields[0])
    raise ValueError(f"no device {device}")


def read_bytes(pid: int) -> tuple[int, int]:
    """Return bytes sent and received in the network namespace of a process.

    Raises:
        OSError, ValueError: The process is gone, or was not yet in its namespace.
    """
    return interface_bytes(Path(f"/proc/{pid}/net/dev").read_text(encoding="utf-8"))


def bytes_at(samples: Samples, when: float) -> tuple[float, float]:
    """Return bytes sent and received until ``when``, interpolated between two samples."""
    index = bisect_left(samples, when, key=lambda sample: sample[0])
    if index == 0:
        return float(samples[0][1]), float(samples[0][2])
    if index == len(samples):
        return float(samples[-1][1]), float(samples[-1][2])
    (t0, sent0, got0), (t1, sent1, got1) = samples[index - 1], samples[index]
    share = (when - t0) / (t1 - t0)
    return sent0 + share * (sent1 - sent0), got0 + share * (got1 - got0)


class Sampler:
    """Reads the counters of running ranks in a thread; a context manager.

    Args:
        pids: Rank -> process, each in its own namespace.
    """

    def __init__(self, pids: Mapping[int, int]) -> None:
        self.samples: dict[int, list[tuple[float, int, int]]] = {rank: [] for rank in pids}
        self._pids = dict(pids)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(_PERIOD_SECONDS):
            for rank, pid in self._pids.items():
                try:
                    sent, received = read_bytes(pid)
                except (OSError, ValueError):
                    continue
                self.samples[rank].append((time.time(), sent, received))
