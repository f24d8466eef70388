"""Starts the training program in a laboratory, one rank a namespace, and waits for it."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .commands import DEVICE, address
from .counters import Sampler
from .lab import Lab, LabError, die_with_parent

__all__ = ["Run", "run_ranks"]

_PORT = 29500  # of the rendezvous; a namespace of its own has no other user of it
_POLL_SECONDS = 0.1
_LOG_TAIL = 2_000


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run.

    Attributes:
        console: Console output of rank 0.
        events: Directory of its event files.
        samples: Rank -> the counters of its link over time.
        seconds: Time from the start of the first process to the end of the last.
    """

    console: str
    events: Path
    samples: Mapping[int, Sequence[tuple[float, int, int]]]
    seconds: float


def run_ranks(
    lab: Lab, config: str, changes: Sequence[str], directory: Path, *, timeout: float
) -> Run:
    """Run ``launch/pretrain.py`` in every namespace until all ranks have ended.

    Args:
        lab: Laboratory to run in.
        config: YAML file.
        changes: ``key=value``; must set ``monitor.dir`` to ``directory / "events"``.
        directory: Directory of logs and events; its contents are deleted.
        timeout: Time limit in seconds.

    Raises:
        LabError: A rank failed, or the time is over; all ranks have ended by then.
    """
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    script = [sys.executable, "-u", "launch/pretrain.py", "--config", config, "--set", *changes]
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        processes = {}
        for rank in range(lab.ranks):
            log = stack.enter_context((directory / f"rank{rank}.log").open("wb"))
            processes[rank] = stack.enter_context(_rank(lab, rank, script, log))
        sampler = stack.enter_context(Sampler({r: p.pid for r, p in processes.items()}))
        failed = _wait(lab, processes, began + timeout)
    console = (directory / "rank0.log").read_text(encoding="utf-8", errors="replace")
    if failed is not None:
        log_text = (directory / f"rank{failed}.log").read_text(encoding="utf-8", errors="replace")
        code = processes[failed].returncode
        raise LabError(f"rank {failed} ended with {code}:\n{log_text[-_LOG_TAIL:]}")
    return Run(console, directory / "events", sampler.samples, time.monotonic() - began)


@contextlib.contextmanager
def _rank(
    lab: Lab, rank: int, script: list[str], log: object
) -> "Iterator[subprocess.Popen[bytes]]":
    environment = os.environ | {
        "RANK": str(rank),
        "WORLD_SIZE": str(lab.ranks),
        "LOCAL_RANK": "0",  # each namespace is a machine
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": address(0),
        "MASTER_PORT": str(_PORT),
        "GLOO_SOCKET_IFNAME": DEVICE,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
    }
    process = subprocess.Popen(
        lab.inside(rank, script),
        env=environment,
        stdout=log,  # type: ignore[call-overload]
        stderr=subprocess.STDOUT,
        preexec_fn=die_with_parent,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _wait(
    lab: Lab, processes: "Mapping[int, subprocess.Popen[bytes]]", deadline: float
) -> int | None:
    """Return the first rank that failed or was too slow, ``None`` when all are done."""
    while True:
        lab.check()
        codes = {rank: process.poll() for rank, process in processes.items()}
        failed = [rank for rank, code in codes.items() if code not in (None, 0)]
        if failed:
            return failed[0]
        running = [rank for rank, code in codes.items() if code is None]
        if not running:
            return None
        if time.monotonic() > deadline:
            return running[0]
        time.sleep(_POLL_SECONDS)
