"""The public API for users with their own Megatron training loop.

Two calls turn a Megatron training script into K replicas::

    groups = initialize_replicas(config)            # instead of initialize_model_parallel
    ...build model and optimizer with groups.pg...
    optimizer = wrap_optimizer(optimizer, model, config, groups)

Afterwards ``optimizer.step()`` makes the inner step and the outer steps that are due. Both names
can also be imported from the package itself.
"""

from megatron_muloco.comm.groups import Groups
from megatron_muloco.training.build_optimizer import wrap_optimizer
from megatron_muloco.training.replica_optimizer import ReplicaOptimizer
from megatron_muloco.training.start import initialize_replicas

__all__ = ["Groups", "ReplicaOptimizer", "initialize_replicas", "wrap_optimizer"]
