"""Which runs this program starts by itself on the CPUs of one machine."""

import os

from megatron_muloco.config.derived import smallest_topology
from megatron_muloco.config.schema import RunConfig
from megatron_muloco.planning.memory import memory_plan
from megatron_muloco.planning.text import human_bytes

__all__ = ["machine_memory", "why_not_on_cpus"]

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
