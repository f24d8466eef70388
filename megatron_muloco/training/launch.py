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

from megatron_muloco.config.derived import smallest_topology
from megatron_muloco.config.schema import RunConfig
from megatron_muloco.planning.memory import memory_plan
from megatron_muloco.planning.report import human_bytes

__all__ = ["launcher_command", "machine_memory", "relaunch", "why_not_on_cpus"]

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


# ------------------------------------------------------------------------------------------
# Which runs this program starts by itself on the CPUs of one machine.


# Chosen: a demo has two to four ranks, a two-way cut of everything eight; what needs more was meant
# for a cluster.
_MOST_CPU_RANKS = 8


def why_not_on_cpus(config: RunConfig, memory: int) -> str:
    """Return why the smallest world of a config is not started on one machine's CPUs, or nothing.

    Args:
        config: A checked config.
        memory: Bytes of the machine.
    """
    layout = smallest_topology(config)
    if layout.world_size > _MOST_CPU_RANKS:
        return (
            f"{layout.world_size} ranks are more than the {_MOST_CPU_RANKS} that are started on "
            "CPUs without being asked for"
        )
    plan = memory_plan(config, layout)
    needed = layout.world_size * (plan.device + plan.host)
    if needed > memory:
        return (
            f"its ranks hold up to {human_bytes(needed)} together, activations not included, and "
            f"this machine has {human_bytes(memory)}"
        )
    return ""


def machine_memory() -> int:
    """Return the bytes of physical memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
