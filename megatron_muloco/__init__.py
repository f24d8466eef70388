"""MuLoCo and DiLoCo pre-training on Megatron-core and DeepSpeed.

Two calls turn your own Megatron training loop into K replicas::

    from megatron_muloco import initialize_replicas, load_config, wrap_optimizer

    config = load_config("run.yaml")
    groups = initialize_replicas(config)      # instead of initialize_model_parallel
    ...                                       # build model and optimizer with groups.pg
    optimizer = wrap_optimizer(optimizer, model, config, groups)

Afterwards ``optimizer.step()`` makes the inner step and the outer steps that are due. Everything
that such a loop needs is exported here. Names are imported on first use, so importing the package
loads neither torch nor Megatron.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_muloco.checkpoint.state import RunState
    from megatron_muloco.checkpoint.store import CheckpointStore
    from megatron_muloco.comm.groups import Groups
    from megatron_muloco.config import load_config
    from megatron_muloco.model.initialise import initialise_weights
    from megatron_muloco.model.layer_spec import decoder_block_spec
    from megatron_muloco.optim.muon import MatrixUpdate
    from megatron_muloco.outer.optimizer import OuterOptimizer
    from megatron_muloco.params import ParameterNames
    from megatron_muloco.training.build_optimizer import wrap_optimizer
    from megatron_muloco.training.replica_optimizer import ReplicaOptimizer
    from megatron_muloco.training.start import initialize_replicas

__all__ = [
    "CheckpointStore",
    "Groups",
    "MatrixUpdate",
    "OuterOptimizer",
    "ParameterNames",
    "ReplicaOptimizer",
    "RunState",
    "decoder_block_spec",
    "initialise_weights",
    "initialize_replicas",
    "load_config",
    "wrap_optimizer",
]

__version__ = "0.1.0"

_HOMES = {
    "CheckpointStore": "megatron_muloco.checkpoint.store",
    "Groups": "megatron_muloco.comm.groups",
    "MatrixUpdate": "megatron_muloco.optim.muon",
    "OuterOptimizer": "megatron_muloco.outer.optimizer",
    "ParameterNames": "megatron_muloco.params",
    "ReplicaOptimizer": "megatron_muloco.training.replica_optimizer",
    "RunState": "megatron_muloco.checkpoint.state",
    "decoder_block_spec": "megatron_muloco.model.layer_spec",
    "initialise_weights": "megatron_muloco.model.initialise",
    "initialize_replicas": "megatron_muloco.training.start",
    "load_config": "megatron_muloco.config",
    "wrap_optimizer": "megatron_muloco.training.build_optimizer",
}


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
