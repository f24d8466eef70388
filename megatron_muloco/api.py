"""The public API for people with a Megatron loop of their own.

Two calls turn a Megatron training script into K replicas::

    groups = initialize_replicas(config)            # instead of initialize_model_parallel
    ...build model and optimizer with groups.pg...
    optimizer = wrap_optimizer(optimizer, model, config, groups)

after which ``optimizer.step()`` is the inner step plus the outer steps that are due.
"""

from datetime import timedelta

import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_muloco.comm.groups import Groups, build_groups
from megatron_muloco.config import RunConfig
from megatron_muloco.config.checks import check
from megatron_muloco.config.derived import topology_of
from megatron_muloco.runtime.distributed import start_distributed
from megatron_muloco.runtime.parallel_state import mirror_groups
from megatron_muloco.training.replica_optimizer import ReplicaOptimizer
from megatron_muloco.training.wiring import wrap_optimizer

__all__ = ["Groups", "ReplicaOptimizer", "initialize_replicas", "wrap_optimizer"]


def initialize_replicas(config: RunConfig) -> Groups:
    """Join the job and return this rank's groups; Megatron's ``parallel_state`` mirrors them.

    Starts ``deepspeed.comm`` unless torch.distributed is already initialised, installs the CPU seam
    where there is no accelerator, builds every process group, checks that all ranks have the same
    configuration, and seeds Megatron's random number trackers.

    Args:
        config: The run; its parallel section must fit the number of ranks.

    Raises:
        TopologyError: The ranks do not factor; names the whole product.
        ConfigError: The configuration does not fit this world, or ranks have different ones.
        RuntimeMismatch: ``parallel_state`` is already initialised.

    Collectives: every rank of the job calls it at the same point.
    """
    timeout = timedelta(minutes=config.training.distributed_timeout_minutes)
    ranks = start_distributed(timeout=timeout)
    topology = topology_of(config, ranks.world_size)
    check(config, topology)
    groups = build_groups(topology, timeout=timeout)
    mirror_groups(groups)
    seed_ranks(config.training.seed, groups)
    return groups


def seed_ranks(seed: int, groups: Groups) -> None:
    """Seed torch and Megatron's trackers.

    All replicas draw alike: the initial weights must agree, and nothing in this model draws later
    (there is no dropout).
    """
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(
        seed, tp_rank=groups.coords.tp, ep_rank=0, etp_rank=groups.coords.tp
    )
