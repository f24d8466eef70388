"""Starts the missing ranks on a machine without accelerators: `relaunch` and `why_not_on_cpus`.

Without accelerators, ``deepspeed script.py`` counts NUMA nodes and usually starts a single rank,
whatever the number of replicas. `relaunch` then replaces the process by DeepSpeed's per-node
launcher with as many ranks as the smallest world of the configuration. `why_not_on_cpus` limits
this to runs that one machine can hold.
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

# Variables that a launcher sets for its ranks; the new launcher must not inherit them.
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
# Variables of torchrun. With them torch would connect to the store of an agent that is not there.
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
    """Replace this process by a launcher of ``ranks`` ranks, which returns their exit code.

    The launcher starts with SIGUSR1 ignored. A SIGUSR1 to the process group then reaches the
    ranks, which save and exit with 85, without ending the launcher first. SIGTERM always ends
    the launcher: it forwards the signal, waits for the ranks, and returns 1.

    Args:
        ranks: Number of ranks to start.
        arguments: Command-line arguments of the script.
        environ: Environment to start from, usually ``os.environ``.
    """
    environment = {
        name: value
        for name, value in environ.items()
        if name not in _LAUNCHER_VARIABLES and not name.startswith(_LAUNCHER_PREFIXES)
    }
    environment.setdefault("DS_ACCELERATOR", "cpu")
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    # OpenMP reads it when torch is loaded. By default idle threads spin at barriers, which takes
    # CPU time from the other ranks.
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    command = launcher_command(ranks, _reserved_port(), os.path.abspath(sys.argv[0]), arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], command, environment)


def _reserved_port() -> int:
    """Return a port that no other process gets while the launcher runs.

    A port that was found free and released could be taken before rank 0 listens on it. So the
    socket stays open across the exec, bound but not listening. Rank 0's store can still listen on
    the same port, because both sockets set SO_REUSEADDR.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    holder.set_inheritable(True)
    port = int(holder.getsockname()[1])
    holder.detach()
    return port


# ---- which runs may be started on the CPUs of one machine --------------------------------

# Chosen: a demo has 2 to 4 ranks, and 2 replicas x tp 2 x pp 2 has 8; larger runs are meant for a
# cluster.
_MOST_CPU_RANKS = 8


def why_not_on_cpus(config: RunConfig, memory: int) -> str:
    """Return why the smallest world of a config is not started on this machine's CPUs, else ``""``.

    Args:
        config: A checked config.
        memory: Memory of the machine in bytes.
    """
    layout = smallest_topology(config)
    if layout.world_size > _MOST_CPU_RANKS:
        return (
            f"{layout.world_size} ranks are more than the {_MOST_CPU_RANKS} that the program "
            "starts on CPUs by itself"
        )
    plan = memory_plan(config, layout)
    needed = layout.world_size * (plan.allocated + plan.host)
    if needed > memory:
        return (
            f"its ranks need up to {human_bytes(needed)} in all, and this machine has "
            f"{human_bytes(memory)}"
        )
    return ""


def machine_memory() -> int:
    """Return the physical memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
