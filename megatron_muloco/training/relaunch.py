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
# torchrun's; with them torch would look for the store of an agent that the new ranks do not have.
_LAUNCHER_PREFIXES = ("TORCHELASTIC_", "GROUP_", "ROLE_")


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

    The launcher is started with SIGUSR1 ignored, so that one sent to the process group reaches the
    ranks, which save and exit with 85, and does not end the launcher first. SIGTERM ends the
    launcher in any case: it passes the signal on, waits for the ranks, and returns 1.

    Args:
        ranks: Ranks to start.
        arguments: Of the script.
        environ: Usually ``os.environ``.
    """
    environment = {
        name: value
        for name, value in environ.items()
        if name not in _LAUNCHER_VARIABLES and not name.startswith(_LAUNCHER_PREFIXES)
    }
    environment.setdefault("DS_ACCELERATOR", "cpu")
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    # Read when torch is loaded. Several threads a rank would else spin at barriers on busy cores.
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    command = launcher_command(ranks, _held_port(), os.path.abspath(sys.argv[0]), arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], command, environment)


def _held_port() -> int:
    """Return a port that the system gives to nobody else while the launcher runs.

    The socket stays open across the exec, bound and not listening. Rank 0's store may listen on the
    same port, because both set SO_REUSEADDR.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    holder.set_inheritable(True)
    port = int(holder.getsockname()[1])
    holder.detach()
    return port
