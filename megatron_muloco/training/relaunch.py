"""Starts the missing ranks where a launcher started only one.

On a machine without accelerators ``deepspeed script.py`` counts NUMA nodes and starts one rank,
however many replicas the configuration has. There the program replaces itself by DeepSpeed's
per-node launcher with as many ranks as the configuration's smallest world.
"""

import base64
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

__all__ = ["launcher_command", "relaunch"]

# What a launcher leaves in the environment of its ranks; the new launcher must not find it.
_LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_SIZE",
    "LOCAL_WORLD_SIZE",
    "CROSS_RANK",
    "CROSS_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CUDA_VISIBLE_DEVICES",
)


def launcher_command(ranks: int, port: int, script: str, arguments: Sequence[str]) -> list[str]:
    """Return the command that starts ``ranks`` ranks of ``script`` on this machine."""
    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(ranks))}).encode())
    return [
        sys.executable,
        "-u",
        "-m",
        "deepspeed.launcher.launch",
        f"--world_info={world.decode()}",
        "--master_addr=127.0.0.1",
        f"--master_port={port}",
        "--log_level=warning",
        "--no_local_rank",
        script,
        *arguments,
    ]


def relaunch(ranks: int, arguments: Sequence[str], environ: Mapping[str, str]) -> NoReturn:
    """Replace this process by a launcher of ``ranks`` ranks; its exit code is theirs.

    The launcher is started with the stop signals ignored, so that a signal to the process group
    reaches the ranks, which save and exit, and does not end the launcher first.

    Args:
        ranks: Ranks to start.
        arguments: Of the script.
        environ: Usually ``os.environ``.
    """
    environment = {k: v for k, v in environ.items() if k not in _LAUNCHER_VARIABLES}
    environment.setdefault("DS_ACCELERATOR", "cpu")
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    command = launcher_command(ranks, port, os.path.abspath(sys.argv[0]), arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], command, environment)
