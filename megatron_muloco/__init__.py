"""MuLoCo and DiLoCo pre-training on Megatron-core and DeepSpeed.

For use in your own Megatron training loop::

    from megatron_muloco import initialize_replicas, load_config, wrap_optimizer

Public names are imported on first use, so importing the package loads neither torch nor Megatron.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_muloco.api import initialize_replicas, wrap_optimizer
    from megatron_muloco.config import load_config

__all__ = ["initialize_replicas", "load_config", "wrap_optimizer"]

__version__ = "0.1.0"

_HOMES = {
    "initialize_replicas": "megatron_muloco.api",
    "load_config": "megatron_muloco.config",
    "wrap_optimizer": "megatron_muloco.api",
}


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
