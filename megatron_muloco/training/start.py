"""`initialize_replicas`: joins the job, builds process groups, checks and seeds all ranks."""

import os
from datetime import timedelta

import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch.distributed import ProcessGroup

from megatron_muloco.comm.collectives import gather_objects
from megatron_muloco.comm.groups import Groups, build_control, build_groups, groups_made
from megatron_muloco.config import RunConfig
from megatron_muloco.config.derived import topology_of
from megatron_muloco.config.outer import NoOuter
from megatron_muloco.config.rules import RULES, check
from megatron_muloco.errors import ConfigError, RuntimeMismatch
from megatron_muloco.monitor.writers import wandb_is_installed
from megatron_muloco.runtime.distributed import start_distributed, use_one_hardware_queue
from megatron_muloco.runtime.parallel_state import mirror_groups, require_unset

__all__ = ["initialize_replicas", "seed_ranks"]


def initialize_replicas(config: RunConfig) -> Groups:
    """Join the job and return this rank's groups; Megatron's ``parallel_state`` mirrors them.

    It starts ``deepspeed.comm`` unless torch.distributed is already initialised, installs the CPU
    seam where there is no accelerator, builds all process groups, checks that all ranks have the
    same configuration, and seeds Megatron's random number trackers.

    Args:
        config: The configuration of the run; its parallel sizes must fit the number of ranks.

    Raises:
        TopologyError: The parallel sizes do not divide the number of ranks.
        ConfigError: The configuration does not fit the number of ranks, or ranks have different
            configurations.
        RuntimeMismatch: ``parallel_state`` is already initialised, or the program has made other
            numbers of process groups on different ranks.

    Collectives: creation of all groups and one object gather over the job; every rank of the job
    calls it at the same point.
    """
    require_unset()
    if config.parallel.tensor_model_parallel_size > 1:
        use_one_hardware_queue(os.environ)
    timeout = timedelta(minutes=config.training.distributed_timeout_minutes)
    ranks = start_distributed(timeout=timeout, deterministic=config.training.deterministic)
    topology = topology_of(config, ranks.world_size)
    check(config, topology, rules=(*RULES, wandb_is_installed))
    control = build_control(timedelta(minutes=config.training.control_timeout_minutes))
    _require_one_config(config, control)
    _require_equal_groups(control)
    outer = config.outer
    by_host = not isinstance(outer, NoOuter) and outer.sends_from_host
    groups = build_groups(
        topology,
        control=control,
        timeout=timeout,
        exchange_backend="gloo" if by_host else None,
        separate_exchange=not isinstance(outer, NoOuter) and outer.overlap_steps > 0,
    )
    mirror_groups(groups)
    seed_ranks(config.training.seed, groups)
    return groups


def _require_one_config(config: RunConfig, control: ProcessGroup) -> None:
    """Raise ConfigError on every rank if a rank's configuration differs from rank 0's.

    Collectives: one object gather over the job.
    """
    dumps = gather_objects(control, config.model_dump(mode="json"))
    for rank, dump in enumerate(dumps):
        if dump != dumps[0]:
            sections = [name for name in dump if dump[name] != dumps[0].get(name)]
            raise ConfigError(
                f"rank {rank} has a different configuration from rank 0 in {', '.join(sections)}. "
                "Every rank must read the same file with the same --set values."
            )


def _require_equal_groups(control: ProcessGroup) -> None:
    """Raise RuntimeMismatch on every rank if ranks are in different numbers of process groups.

    Collectives: one object gather over the job.
    """
    made = gather_objects(control, groups_made())
    for rank, number in enumerate(made):
        if number != made[0]:
            raise RuntimeMismatch(
                f"rank {rank} is in {number} process groups where rank 0 is in {made[0]}. torch "
                "names new groups by that number, so ranks would wait for each other without end. "
                "Call initialize_replicas before the program makes groups of its own."
            )


def seed_ranks(seed: int, groups: Groups) -> None:
    """Seed torch and Megatron's trackers.

    All replicas get the same seeds, because their initial weights must be equal. Nothing in the
    model draws random numbers after that (there is no dropout).
    """
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(
        seed, tp_rank=groups.coords.tp, ep_rank=0, etp_rank=groups.coords.tp
    )
